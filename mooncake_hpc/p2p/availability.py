"""A holder's board: which shards it holds and which it is fetching from whom, in memory that the others read.

To read it costs its holder nothing and the reader microseconds, so that news of a shard is everywhere within
hundredths of a second, whether or not the metadata store answers. Records there follow at leisure.

    u64 token | CLAIMS × (u32 source, u32 shard + 1, with ENDING; 0: unused) | bits, shard i in bit i % 8 of byte i // 8

A torn read does no harm: bits are only ever set, and claims are advice. The token tells an object's board from whatever
its memory is used for later.
"""

from __future__ import annotations

import secrets
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mooncake_hpc.p2p.layout import Bytes
from mooncake_hpc.p2p.peer_state import Bits

if TYPE_CHECKING:
    from mooncake_hpc.engine.engine import TransferEngine

CLAIMS = 32  # shards under way that a board tells of
TOKEN, ENTRY = 8, 8  # bytes
BITS = TOKEN + CLAIMS * ENTRY  # where the bits begin
ENDING = 1 << 31  # the shard is nearly here: all of it will be by the time that this is read
CHUNK = 64 << 10  # bytes that are allocated at a time


def board_size(shards: int) -> int:
    """Bytes of a board, a multiple of 8."""
    return BITS + -(-shards // 64) * 8


def source_id(name: str) -> int:
    """What stands for a holder's name in claims."""
    return zlib.crc32(name.encode())


@dataclass(frozen=True, slots=True)
class Place:
    """Where a holder's board is, for its record."""

    address: int
    token: int


class Board:
    """Our own. One thread at a time."""

    def __init__(self, memory: Bytes, have: Bits) -> None:
        """`memory` is zeroed, of `board_size` bytes."""
        self.memory = memory
        self.place = Place(int(memory.ctypes.data), secrets.randbits(62) + 1)
        self._claims = memory[TOKEN:BITS].view(np.uint32).reshape(CLAIMS, 2)
        self._bits = memory[BITS:]
        packed = np.packbits(have, bitorder="little")
        self._bits[: len(packed)] = packed
        self._at: dict[tuple[int, int], int] = {}
        self._free = list(range(CLAIMS))
        memory[:TOKEN].view(np.uint64)[0] = self.place.token

    def hold(self, shard: int) -> None:
        """The shard is here and verified."""
        self._bits[shard >> 3] |= 1 << (shard & 7)

    def claim(self, source: str, shard: int) -> None:
        """The shard is under way from the source."""
        key = source_id(source), shard
        if self._free and key not in self._at:
            self._at[key] = place = self._free.pop()
            self._claims[place] = key[0], shard + 1

    def ending(self, source: str, shard: int) -> None:
        """What is claimed is nearly here."""
        place = self._at.get((source_id(source), shard))
        if place is not None:
            self._claims[place, 1] |= ENDING

    def unclaim(self, source: str, shard: int) -> None:
        """It is not any more."""
        place = self._at.pop((source_id(source), shard), None)
        if place is not None:
            self._claims[place] = 0
            self._free.append(place)


@dataclass(frozen=True, slots=True)
class News:
    """What a board says: shards that are there, (source id, shard) of its claims, and shards that nearly are there."""

    have: Bits
    claims: list[tuple[int, int]]
    ending: frozenset[int]


def read_board(memory: Bytes, token: int, shards: int) -> News | None:
    """What a copy of a board says. None when it is another one's."""
    if int(memory[:TOKEN].view(np.uint64)[0]) != token:
        return None
    have = np.unpackbits(memory[BITS:], count=shards, bitorder="little").astype(bool)
    claims = memory[TOKEN:BITS].view(np.uint32).reshape(CLAIMS, 2)
    places = claims[:, 1] & (ENDING - 1)
    used = (places > 0) & (places <= shards)
    pairs = [(int(source), int(place) - 1) for source, place in zip(claims[used, 0], places[used], strict=True)]
    return News(have, pairs, frozenset((places[used & (claims[:, 1] >= ENDING)] - 1).tolist()))


def by_source(claims: Iterable[tuple[int, int]], names: Mapping[int, str]) -> dict[str, tuple[int, ...]]:
    """Claims by the name of the source, of those in `names`, which are by `source_id`."""
    found: dict[str, tuple[int, ...]] = {}
    for source, shard in claims:
        if (name := names.get(source)) is not None:
            found[name] = (*found.get(name, ()), shard)
    return found


class MemoryPool:
    """Registered memory for boards, or for copies of others', in pieces that are used again. Thread-safe."""

    def __init__(self, engine: TransferEngine, remote_accessible: bool) -> None:
        self._engine, self._remote_accessible = engine, remote_accessible
        self._lock = threading.Lock()
        self._unused: dict[int, list[Bytes]] = {}
        self._rest: Bytes = np.zeros(0, np.uint8)

    def take(self, size: int) -> Bytes:
        """Zeroed memory. Raises RegistrationError, MetadataError."""
        with self._lock:
            if unused := self._unused.get(size):
                return unused.pop()
            if len(self._rest) < size:
                remote = self._remote_accessible
                self._rest = self._engine.allocate(max(size, CHUNK), remote_accessible=remote, writable_by_peers=False)
            memory, self._rest = self._rest[:size], self._rest[size:]
            return memory

    def give(self, memory: Bytes) -> None:
        """Take it back; whoever reads it from now on reads zeros."""
        memory[:] = 0
        with self._lock:
            self._unused.setdefault(len(memory), []).append(memory)

    def clear(self) -> None:
        """Let go of what is unused; the engine is closed."""
        with self._lock:
            self._unused.clear()
            self._rest = np.zeros(0, np.uint8)
