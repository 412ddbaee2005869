"""An RDMA device that does nothing, under the real lane: a post is taken at once, a poll says that all has completed.

For what depends on the lane alone: its cost an operation (`benchmarks/verbs_noop.py`), and what it posts while others
cancel. The device counts the work requests that reach it, as a provider's post_send does that walks the chain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from numba import cfunc, types

from mooncake_hpc.core.settings import Settings
from mooncake_hpc.native.atomics import get, put
from mooncake_hpc.native.compile import compile_ahead, kept
from mooncake_hpc.transports import queue_kernels as layout
from mooncake_hpc.transports.base import Peer, Registration, Transport
from mooncake_hpc.transports.queue import SHARED_KERNELS
from mooncake_hpc.transports.rdma import poll_kernels as native
from mooncake_hpc.transports.rdma import rail_kernels as rails
from mooncake_hpc.transports.rdma.lane import RdmaLane, RdmaRoute
from mooncake_hpc.transports.rdma.rail import RailBlock
from mooncake_hpc.transports.rdma.regions import KeyTables, remote_rows
from mooncake_hpc.transports.rdma.topology import Topology
from mooncake_hpc.transports.rdma.verbs import Calls
from mooncake_hpc.transports.rdma.verbs_kernels import SUCCESS, WC, WC_ID, WC_STATUS, WR_NEXT
from mooncake_hpc.wire.descriptor import BufferDescriptor, DeviceDescriptor, SegmentDescriptor

DEVICE = DeviceDescriptor("none", "00:" * 15 + "01", 0)
WORD = types.int64


@kept
@cfunc(types.int32(WORD, WORD, WORD))
def post(taken, wr, _bad):
    """As post_send of a device that takes everything; `taken` is where its number is kept."""
    while wr != 0:
        put(taken, get(taken) + 1)
        wr = get(wr + WR_NEXT)
    return 0


@kept
@cfunc(types.int32(WORD, WORD, WORD))
def poll(rail, most, wcs):
    """As poll_cq: the last work request of each queue pair with something under way has completed."""
    count = 0
    for number in range(get(rail + rails.RAIL_QP_COUNT)):
        qp = get(get(rail + rails.RAIL_QPS) + 8 * number)
        if get(qp + rails.QP_POSTED) != get(qp + rails.QP_RETIRED) and count < most:
            put(wcs + WC * count + WC_ID, (get(qp + rails.QP_POSTED) - 1) << 8 | number)
            put(wcs + WC * count + WC_STATUS, SUCCESS)
            count += 1
    return count


class NoRail(RailBlock):
    """A rail without a device."""

    def __init__(self, settings: Settings) -> None:
        self.taken = np.zeros(settings.rdma.queue_pairs, np.int64)  # work requests a queue pair
        counters = [int(self.taken[number:].ctypes.data) for number in range(len(self.taken))]
        calls = [Calls(counter, post.address or 0, 0, poll.address or 0, 0) for counter in counters]
        super().__init__(calls, settings.rdma.max_wr, 0, 0)
        self.words[rails.RAIL_CQ // 8] = self.address

    @property
    def posted(self) -> list[int]:
        """Work requests a queue pair that the lane knows of."""
        return [int(pair.words[rails.QP_POSTED // 8]) for pair in self._pairs]


class NoopLane(RdmaLane):
    def __init__(self, opened: list[NoRail], *of_lane: Any) -> None:
        self._opened_rails = opened
        super().__init__(*of_lane)  # its thread opens the rail

    def interrupt(self) -> None:
        return

    def repair(self) -> None:
        self._opened_rails.append(NoRail(self._settings))
        self._rails = self._opened_rails[-1:]  # type: ignore[assignment]
        self._list_rails()
        layout.go_up(self.address)

    def fail_queue(self, code: int) -> None:
        native.fail_queue(self.address, code)


class NoopTransport(Transport):
    """Registrations and routes as of RDMA, with keys that nobody looks at."""

    name = "noop"

    def __init__(self, settings: Settings, opened: list[NoRail]) -> None:
        self._settings, self._opened = settings, opened
        self._kept: list[object] = []
        self._regions: Any = SimpleNamespace(tables=KeyTables(self._kept.append))
        compile_ahead(*native.KERNELS, *SHARED_KERNELS)

    def export(self, registrations: Sequence[Registration], *, shrinks: bool) -> None:
        self._regions.tables.fill((r.address, r.address + r.length, (1, 7), r.readonly) for r in registrations)

    def describe(self, descriptor: SegmentDescriptor) -> SegmentDescriptor:
        return replace(descriptor, devices=(DEVICE,))

    def buffers(self, buffers: tuple[BufferDescriptor, ...]) -> tuple[BufferDescriptor, ...]:
        return tuple(replace(buffer, lkeys=(7,), rkeys=(7,)) for buffer in buffers)

    def connect(self, peer: Peer) -> RdmaRoute:
        keys = KeyTables(self._kept.append)
        keys.fill(remote_rows(peer.descriptor))
        nothing: Any = None
        lane = NoopLane(self._opened, peer, [], Topology({}), nothing, self._regions, keys, self._settings)
        return RdmaRoute(lane, keys, self._regions, self._settings)

    def close(self) -> None:
        return


@contextlib.contextmanager
def installed() -> Iterator[list[NoRail]]:
    """Engines with `protocol="rdma"` are of this device alone, meanwhile; gives the rails that they open."""
    opened: list[NoRail] = []

    def make(_protocol: str, listener: Any, _host: str, settings: Settings, *_others: object) -> list[Transport]:
        listener.close()
        return [NoopTransport(settings, opened)]

    with mock.patch("mooncake_hpc.engine.engine.make_transports", make):
        yield opened
