"""What a transport is to the engine, and what the engine is to a transport."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.authentication import Expected
from mooncake_hpc.core.interrupt import Interrupt
from mooncake_hpc.core.memory import MemoryFile
from mooncake_hpc.native import ranges
from mooncake_hpc.transports import queue_kernels as layout
from mooncake_hpc.transports.queue import Lane
from mooncake_hpc.wire.descriptor import BufferDescriptor, SegmentDescriptor

WHOLE = 1 << 62  # slice limit of a route with one lane: no reason to cut


@dataclass(frozen=True, slots=True)
class Registration:
    """Memory of this process that transports may touch.

    `owner` keeps it in place, `file` is the memory file that it lies in, if any, and `allocated` tells whether that
    was made for this registration. `readonly` holds for ourselves as well, `writable_by_peers` for peers alone.
    """

    address: int
    length: int
    location: str
    readonly: bool
    remote_accessible: bool
    owner: object = field(repr=False, compare=False)
    file: MemoryFile | None = field(default=None, repr=False, compare=False)
    allocated: bool = False
    writable_by_peers: bool = True

    @property
    def readonly_for_peers(self) -> bool:
        return self.readonly or not self.writable_by_peers


class Tables:
    """A pair of range tables, readable and writable, at one address for the kernels."""

    def __init__(self, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]) -> None:
        self._tables = ranges.table(readable), ranges.table(writable)
        self.pair = np.array([table.ctypes.data for table in self._tables], np.int64)
        self.address = int(self.pair.ctypes.data)

    @classmethod
    def of(cls, spans: Iterable[tuple[int, int, bool]]) -> Self:
        """The tables of (start, end, whether read-only) ranges."""
        spans = list(spans)
        return cls([(s, e) for s, e, _ in spans], [(s, e) for s, e, readonly in spans if not readonly])


class RangePair(Protocol):
    """What gives a pair of table addresses, readable and writable, and keeps the tables."""

    pair: npt.NDArray[np.int64]


class Peer(Protocol):
    """A remote segment as a transport sees it."""

    name: str
    interrupt: Interrupt  # ends whatever waits for the peer

    @property
    def descriptor(self) -> SegmentDescriptor:
        """As last read."""

    @property
    def expected(self) -> Expected:
        """Who has to prove to be it."""

    def refresh(self) -> SegmentDescriptor:
        """Read the descriptor again. Raises PeerLost when its process is another one than before, or is gone."""

    def endpoint(self) -> tuple[str, int]:
        """Host and port of its TCP data port."""

    def fence(self, connection: str, timeout: float) -> bool:
        """Whether nothing sent over that data connection can land any more (False: the peer cannot tell)."""

    def handshake(self, request: dict[str, Any], timeout: float) -> str:
        """The answer of its RPC port to a Connection request, as JSON text. Raises PeerLost."""


class Route(ABC):
    """The way of one transport to one peer: its lanes, and which remote ranges they reach."""

    transport: str

    def __init__(self, lanes: list[Lane], tables: RangePair, slice_limit: int = WHOLE, fence_byte: int = 0) -> None:
        """`fence_byte` is the address of a scratch byte for protocol version 1, see `engine.slice_kernels`."""
        self.lanes = lanes
        self._block = np.zeros(layout.ROUTE_WORDS, np.int64)
        self.address = int(self._block.ctypes.data)
        self._block[layout.ROUTE_LIMIT // 8] = slice_limit
        self._block[layout.ROUTE_FENCE // 8] = fence_byte
        self._block[layout.ROUTE_LANE // 8] = lanes[0].address if len(lanes) == 1 else 0
        self._set_tables(tables)

    def _set_tables(self, tables: RangePair) -> None:
        self._block[:2] = tables.pair  # no kernel reads them meanwhile: those hold the GIL
        self._tables = tables

    @abstractmethod
    def update(self, descriptor: SegmentDescriptor) -> None:
        """Take over a newer descriptor of the same generation."""

    def mapped(self, address: int, nbytes: int) -> npt.NDArray[np.uint8] | None:
        """These bytes of the peer's registered memory, where this process can read them in place; read-only."""
        return None

    def stop(self, cause: str) -> None:
        """Have all lanes end, and fail what they carry as lost, with this cause; does not wait for it. Idempotent."""
        for lane in self.lanes:
            lane.stop(cause)

    def close(self, cause: str) -> None:
        """Close all lanes, as `stop`. Idempotent."""
        self.stop(cause)
        for lane in self.lanes:
            lane.close(cause)


class Transport(ABC):
    """Moves bytes one way: serves our registrations to others, and makes routes to peers."""

    name: str

    @abstractmethod
    def export(self, registrations: Sequence[Registration], *, shrinks: bool) -> None:
        """Serve exactly these from now on; with `shrinks`, return only once no peer can touch the others any more."""

    def start(self, name: str, changed: Callable[[], None], lookup: Callable[[str], SegmentDescriptor]) -> None:
        """Before all else: the name that we publish, what to call when `describe` has something new to say, and what
        gives the present descriptor of any segment (raises MetadataError and its kind)."""
        return

    def buffers(self, buffers: tuple[BufferDescriptor, ...]) -> tuple[BufferDescriptor, ...]:
        """Add to the descriptors of exported memory what peers need to reach it."""
        return buffers

    def answer(self, request: str) -> dict[str, Any] | None:
        """The answer to a Connection request, JSON text, at our RPC port, or None where that is another transport's."""
        return None

    @abstractmethod
    def describe(self, descriptor: SegmentDescriptor) -> SegmentDescriptor:
        """Add to what we publish how peers reach us by this transport."""

    @abstractmethod
    def connect(self, peer: Peer) -> Route | None:
        """A route to the peer, or None where it offers none. Raises PeerLost."""

    def fence(self, connection: str, timeout: float) -> bool:
        """Whether nothing that came over this data connection of ours can land any more, within `timeout` seconds."""
        return True

    @abstractmethod
    def close(self) -> None:
        """Stop serving; release everything. Idempotent."""
