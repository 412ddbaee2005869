"""How far a pull is, and what came from whom; and what its caller asks of it beside the bytes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from mooncake_hpc.core.errors import TransferCancelled, TransferTimeout


@dataclass(slots=True)
class Progress:
    """For progress callbacks and results. Bytes; `sources` are bytes by holder; seconds."""

    size: int
    done: int = 0
    shards: int = 0
    shards_done: int = 0
    resumed: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    transports: dict[str, str] = field(default_factory=dict)
    wrong: Counter[str] = field(default_factory=Counter)  # shards that did not match their digest, by source
    failures: Counter[str] = field(default_factory=Counter)
    raced: int = 0
    seconds: float = 0.0

    @property
    def throughput(self) -> float:
        """Bytes a second that came from others."""
        return (self.done - self.resumed) / self.seconds if self.seconds else 0.0


OnProgress = Callable[[Progress], object]


@dataclass(frozen=True, slots=True)
class Terms:
    """Until when a caller waits (time.monotonic; None: as long as it takes), what it sets to give up, and whom to tell
    how far it is."""

    deadline: float | None = None
    cancel: threading.Event | None = None
    tell: OnProgress | None = None

    @property
    def cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.is_set()

    def check(self, what: Callable[[], str], causes: Callable[[], str]) -> None:
        """Raises TransferCancelled, TransferTimeout: `what` is not done, and why."""
        if self.cancelled:
            raise TransferCancelled(f"{what()} was cancelled")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TransferTimeout(f"{what()} is not done at its deadline{causes()}")
