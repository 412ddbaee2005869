"""Following the keys under a prefix: every change is told, in order, and none is lost when the store is away.

A watch delivers dictionaries of what changed, `{key: value, or None where the key went}`. The first holds all keys
that are there. After trouble it lists again and delivers the difference, so that intermediate values may be
skipped, but never the last one.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from mooncake_hpc.core import process

log = logging.getLogger(__name__)

Changes = Mapping[str, str | None]
OnChange = Callable[[Changes], object]


class Watch(ABC):
    """A thread that calls `on_change`, which must be quick and must not close the watch. Close it, or use `with`."""

    def __init__(self, prefix: str, on_change: OnChange) -> None:
        self._process = process.here
        self.prefix = prefix
        self._on_change = on_change
        self._present: dict[str, str] = {}
        self._listed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mooncake-watch", daemon=True)

    def close(self) -> None:
        """End the thread; nothing is delivered once this returns. Idempotent. Nothing happens in a child."""
        if self._process is not process.here:
            return
        self._closing.set()
        self._interrupt()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    @abstractmethod
    def _run(self) -> None:
        """The thread: call `_list` and `_change` until `_closing`."""

    @abstractmethod
    def _interrupt(self) -> None:
        """Wake the thread, as `_closing` is set."""

    def _list(self, present: Mapping[str, str]) -> None:
        """Deliver how all keys under the prefix differ from what was delivered."""
        changes: dict[str, str | None] = {key: None for key in self._present.keys() - present.keys()}
        changes.update((k, v) for k, v in present.items() if self._present.get(k) != v)
        if changes or not self._listed:
            self._listed = True
            self._change(changes)

    def _change(self, changes: Changes) -> None:
        for key, value in changes.items():
            if value is None:
                self._present.pop(key, None)
            else:
                self._present[key] = value
        if self._closing.is_set():
            return
        try:
            self._on_change(changes)
        except Exception:
            log.exception("watch of %r", self.prefix)

    def __enter__(self) -> Self:
        process.check(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
