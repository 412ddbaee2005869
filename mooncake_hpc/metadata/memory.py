"""A metadata store inside one process: what `memory://NAME` names. For tests and single-process programs."""

from __future__ import annotations

import os
import threading
from typing import Self
from weakref import WeakValueDictionary

from mooncake_hpc.core import process
from mooncake_hpc.core.errors import MetadataError, NameInUse
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.metadata.watch import OnChange, Watch


class _Space:
    """What all stores of one name share: each key's value, and the store that put it."""

    def __init__(self) -> None:
        self.lock = threading.Condition()  # notified of every change
        self.entries: dict[str, tuple[str, MemoryStore]] = {}

    def put(self, key: str, value: str, owner: MemoryStore) -> None:
        before = self.entries.get(key)
        if before is not None and before[1] is not owner:
            before[1].lose(key)
        self.entries[key] = (value, owner)
        self.lock.notify_all()

    def remove(self, key: str) -> None:
        del self.entries[key]
        self.lock.notify_all()

    def select(self, prefix: str) -> dict[str, str]:
        return {key: value for key, (value, _) in self.entries.items() if key.startswith(prefix)}


_spaces: WeakValueDictionary[str, _Space] = WeakValueDictionary()
_spaces_lock = process.lock()


def _begin_child() -> None:
    """What a child inherits is its parent's: its own stores of the same names see none of it."""
    global _spaces
    _spaces = WeakValueDictionary()


os.register_at_fork(after_in_child=_begin_child)


class MemoryStore(MetadataStore):
    """Stores of one name see the same keys; the space ends with its last store. Nothing expires here."""

    def __init__(self, name: str) -> None:
        self._process = process.here
        self.spec = f"memory://{name}"
        self._closed = False
        self._lost: frozenset[str] = frozenset()
        with _spaces_lock:
            self._space = _spaces.setdefault(name, _Space())

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def get(self, key: str) -> str | None:
        self._check_open()
        with self._space.lock:
            entry = self._space.entries.get(key)
        return None if entry is None else entry[0]

    def list(self, prefix: str) -> dict[str, str]:
        self._check_open()
        with self._space.lock:
            return self._space.select(prefix)

    def publish(self, key: str, value: str) -> None:
        self._check_open()
        with self._space.lock:
            if key in self._lost and key in self._space.entries:
                raise NameInUse(f"{key} at {self.spec} now belongs to another store: it is left alone")
            self._space.put(key, value, self)
            self._lost -= {key}

    def create(self, key: str, value: str) -> bool:
        self._check_open()
        with self._space.lock:
            if key in self._space.entries:
                return False
            self._space.put(key, value, self)
            self._lost -= {key}
            return True

    def watch(self, prefix: str, on_change: OnChange) -> Watch:
        self._check_open()
        return _MemoryWatch(self._space, prefix, on_change)

    def withdraw(self, key: str) -> None:
        self._check_open()
        with self._space.lock:
            self._lost -= {key}
            entry = self._space.entries.get(key)
            if entry is not None and entry[1] is self:
                self._space.remove(key)

    @property
    def lost(self) -> frozenset[str]:
        process.check(self)
        return self._lost

    def lose(self, key: str) -> None:
        """Another store puts our key."""
        process.check(self)
        self._lost |= {key}

    def close(self) -> None:
        if self._process is not process.here:
            return
        self._closed = True
        with self._space.lock:
            for key in [key for key, (_, owner) in self._space.entries.items() if owner is self]:
                self._space.remove(key)

    def _check_open(self) -> None:
        process.check(self)
        if self._closed:
            raise MetadataError(f"metadata store {self.spec} is closed")


class _MemoryWatch(Watch):
    def __init__(self, space: _Space, prefix: str, on_change: OnChange) -> None:
        super().__init__(prefix, on_change)
        self._space = space
        self._thread.start()

    def _run(self) -> None:
        seen: dict[str, str] | None = None
        while not self._closing.is_set():
            with self._space.lock:
                while (present := self._space.select(self.prefix)) == seen and not self._closing.is_set():
                    self._space.lock.wait()
            seen = present
            self._list(present)

    def _interrupt(self) -> None:
        with self._space.lock:
            self._space.lock.notify_all()
