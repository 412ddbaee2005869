"""Objects that the original's P2P Store published, read as they stand.

    mooncake/checkpoint/<name>   {"name", "size", "size_list": [bytes a buffer], "max_shard_size",
                                  "shards": [{"size", "gold": [{"segment_name", "offset"}], "replica_list": the same}]}

`offset` is an address in that segment, lists may be null, shards are the buffers' bytes in order. There are no digests:
bytes cannot be verified, so that such a replica is not offered to others. Every place of a shard is tried, all of them
share the load, and one that failed comes last from then on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from mooncake_hpc.core.decode import Address, Count, Name, Positive, Reader, check_range, warn_once
from mooncake_hpc.core.errors import MalformedRecord, MooncakeError, ObjectNotFound
from mooncake_hpc.core.request import READ, REQUEST
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.p2p.availability_poller import end_batch
from mooncake_hpc.p2p.catalog import ObjectInfo
from mooncake_hpc.p2p.layout import Layout, Memory, pair
from mooncake_hpc.p2p.manifest import LARGEST_OBJECT, UNVERIFIED, Manifest
from mooncake_hpc.p2p.progress import Progress, Terms

if TYPE_CHECKING:
    from mooncake_hpc.engine.batch import Batch
    from mooncake_hpc.engine.engine import TransferEngine

log = logging.getLogger(__name__)

PREFIX = "mooncake/checkpoint/"  # the original's P2P Store knows no MC_METADATA_CLUSTER_ID
WINDOW = 4  # shards under way
LOOK = 0.05  # seconds between two looks at deadline and cancellation


@dataclass(frozen=True, slots=True)
class Shard:
    """Bytes `begin` to `end` of the object, and the (segment, address) that hold them."""

    begin: int
    end: int
    places: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An object of the original's."""

    name: str
    sizes: tuple[int, ...]
    shards: tuple[Shard, ...]

    @classmethod
    def from_json(cls, text: str, where: str) -> Checkpoint:
        """Raises MalformedRecord, which names `where`, for a value that is no object of the original's."""
        value = _read(text, where)
        shards = value.shards or ()
        ends = [*accumulate(shard.size for shard in shards)]
        return cls(
            value.name,
            value.size_list or (),
            tuple(Shard(end - shard.size, end, shard.places()) for shard, end in zip(shards, ends, strict=True)),
        )

    def manifest(self) -> Manifest:
        """Ours of the same object, without digests."""
        largest = max((shard.end - shard.begin for shard in self.shards), default=1)
        return Manifest(self.name, "original", self.sizes, largest, UNVERIFIED, b"")

    def holders(self) -> dict[str, int]:
        """Shards by segment."""
        return dict(Counter(name for shard in self.shards for name in {segment for segment, _ in shard.places}))


class _Place(Struct):
    segment_name: Name
    offset: Address


class _Shard(Struct):
    size: Positive
    gold: list[_Place] | None = None
    replica_list: list[_Place] | None = None

    def __post_init__(self) -> None:
        for place in self._all():
            check_range(place.offset, self.size)

    def places(self) -> tuple[tuple[str, int], ...]:
        """Replicas first."""
        return tuple((place.segment_name, place.offset) for place in self._all())

    def _all(self) -> list[_Place]:
        return [*(self.replica_list or ()), *(self.gold or ())]


class _Payload(Struct):
    """The value as the original writes it."""

    name: Name
    size_list: tuple[Count, ...] | None = None
    shards: list[_Shard] | None = None

    def __post_init__(self) -> None:
        size, held = sum(self.size_list or ()), sum(shard.size for shard in self.shards or ())
        if size != held:
            raise ValueError(f"shards of {held} bytes for buffers of {size}")
        if size >= LARGEST_OBJECT:
            raise ValueError(f"an object of {size} bytes")


_read = Reader(_Payload, "object of the original's P2P Store")


def find(store: MetadataStore, name: str) -> Checkpoint | None:
    """The original's object of this name. Raises MalformedRecord, MetadataUnavailable."""
    text = store.get(PREFIX + name)
    return None if text is None else _named(text, name, store)


def _named(text: str, name: str, store: MetadataStore) -> Checkpoint:
    where = f"key {PREFIX + name!r} in {store.spec}"
    found = Checkpoint.from_json(text, where)
    if found.name != name:
        raise MalformedRecord(f"{where} holds no object of that name, but {found.name!r}")
    return found


def list_originals(store: MetadataStore, prefix: str) -> list[ObjectInfo]:
    """The original's objects whose names begin so. What is none is left out. Raises MetadataUnavailable."""
    found = []
    for key, text in sorted(store.list(PREFIX + prefix).items()):
        try:
            one = _named(text, key.removeprefix(PREFIX), store)
        except MalformedRecord as error:
            warn_once(log, error)
            continue
        made = one.manifest()
        shards = len(one.shards)
        found.append(ObjectInfo(one.name, made.version, made.size, shards, made.shard_size, one.sizes, one.holders()))
    return found


class Fetch:
    """Reads the bytes that `memory` spans. Nothing touches it any more once `run` has returned or raised."""

    def __init__(self, engine: TransferEngine, checkpoint: Checkpoint, memory: Memory) -> None:
        self._engine, self._checkpoint, self._memory = engine, checkpoint, memory
        wanted = [s for s in checkpoint.shards if max(s.begin, memory.begin) < min(s.end, memory.end)]
        self._todo = deque((shard, self._order(number, shard)) for number, shard in enumerate(wanted))
        self._flying: deque[_Flight] = deque()
        self._causes: dict[str, str] = {}  # what segments failed of
        self.progress = Progress(memory.end - memory.begin, shards=len(wanted))

    @staticmethod
    def _order(number: int, shard: Shard) -> list[tuple[str, int]]:
        turn = number % max(1, len(shard.places))
        return [*shard.places[turn:], *shard.places[:turn]]

    def run(self, terms: Terms) -> Progress:
        """Raises TransferTimeout, TransferCancelled, and ObjectNotFound for a shard that no place gives."""
        started = time.monotonic()
        try:
            while self._todo or self._flying:
                while self._todo and len(self._flying) < WINDOW:
                    self._begin(*self._todo.popleft())
                self._take_in()
                self.progress.seconds = time.monotonic() - started
                if terms.tell is not None:
                    terms.tell(self.progress)
                if self._todo or self._flying:
                    terms.check(self._what, self._told)
        finally:
            for flight in self._flying:
                end_batch(flight.batch)
        return self.progress

    def _what(self) -> str:
        size, done = self.progress.size, self.progress.done
        return f"object {self._checkpoint.name!r} of the original's: {done} of {size} bytes; the pull"

    def _told(self) -> str:
        return "".join(f"; {segment}: {text}" for segment, text in self._causes.items())

    def _begin(self, shard: Shard, places: list[tuple[str, int]]) -> None:
        """Ask the first of the places that can be asked."""
        places.sort(key=lambda place: place[0] in self._causes)
        while places:
            segment, address = places.pop(0)
            try:
                batch = self._submit(shard, segment, address)
            except MooncakeError as error:
                self._fail(segment, error)
                continue
            self._flying.append(_Flight(shard, segment, places, batch))
            return
        raise ObjectNotFound(
            f"object {self._checkpoint.name!r} of the original's: bytes {shard.begin} to {shard.end} cannot be had "
            f"from any of the {len(shard.places)} places that it names{self._told()}"
        )

    def _submit(self, shard: Shard, segment: str, address: int) -> Batch:
        opened = self._engine.open_segment(segment)
        begin, end = max(shard.begin, self._memory.begin), min(shard.end, self._memory.end)
        remote = Layout([(address, shard.end - shard.begin)], shard.begin)
        pairs = pair(self._memory, remote, begin, end)
        requests = np.zeros(len(pairs), REQUEST)
        requests["opcode"], requests["target_id"] = READ, opened.id
        requests["local_addr"], requests["remote_addr"], requests["length"] = zip(*pairs, strict=True)
        self.progress.transports[segment] = opened.transport
        return self._engine.submit(requests)

    def _take_in(self) -> None:
        flight = self._flying[0]
        if not flight.batch.join(LOOK):
            return
        self._flying.popleft()
        if (error := flight.batch.error) is not None:
            self._fail(flight.segment, error)
            self._begin(flight.shard, flight.places)
            return
        nbytes = min(flight.shard.end, self._memory.end) - max(flight.shard.begin, self._memory.begin)
        self.progress.done += nbytes
        self.progress.shards_done += 1
        self.progress.sources[flight.segment] += nbytes

    def _fail(self, segment: str, error: MooncakeError) -> None:
        self._causes[segment] = str(error)
        self.progress.failures[segment] += 1


@dataclass(slots=True)
class _Flight:
    shard: Shard
    segment: str
    places: list[tuple[str, int]]  # left to be tried
    batch: Batch
