"""How far a pull is, and what came from whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


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
