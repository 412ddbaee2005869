"""SIEVE, the order in which a full cache evicts (Zhang et al., NSDI 2024): no move on a hit, one hand that sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Sieve(Generic[K, V]):
    """A dictionary from old to new with a hand. `visited(value)` tells, and forgets, whether it was used since."""

    def __init__(self, visited: Callable[[V], bool]) -> None:
        self._entries: dict[K, V] = {}
        self._visited = visited
        self._hand: K | None = None

    def get(self, key: K) -> V | None:
        return self._entries.get(key)

    def put(self, key: K, value: V) -> None:
        """Add as the newest."""
        self.drop(key)
        self._entries[key] = value

    def drop(self, key: K) -> V | None:
        """Take out."""
        if key == self._hand:
            self._hand = self._after(key)
        return self._entries.pop(key, None)

    def evict(self) -> V | None:
        """Take out the first entry from the hand on that was not used since the hand passed it last."""
        keys = list(self._entries)
        if not keys:
            return None
        at = keys.index(self._hand) if self._hand in self._entries else 0
        for step in range(2 * len(keys)):
            key = keys[(at + step) % len(keys)]
            if not self._visited(self._entries[key]):
                self._hand = key
                return self.drop(key)
        return self.drop(keys[at])  # all are used all the time

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[V]:
        return iter(list(self._entries.values()))

    def _after(self, key: K) -> K | None:
        keys = list(self._entries)
        at = keys.index(key) + 1
        return keys[at] if at < len(keys) else None
