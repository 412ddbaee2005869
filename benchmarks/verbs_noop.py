"""What the engine itself costs an RDMA operation: everything from submit() to the end of wait(), without a device.

The lane's rail has functions that do nothing for `post_send` and `poll_cq`: a post is taken at once, a poll says that
all of it has completed. So this measures requests, slicing, queueing, work requests, completions and Python's part, on
any machine: `python benchmarks/verbs_noop.py [--batch 128] [--size 64] [--rounds 40]`, one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from numba import cfunc, types

from mooncake_hpc import REQUEST, WRITE, TransferEngine
from mooncake_hpc.kernels import lane as layout
from mooncake_hpc.kernels import rails
from mooncake_hpc.kernels import rdma as native
from mooncake_hpc.kernels.native import compile_ahead, get, put
from mooncake_hpc.kernels.verbs import SUCCESS, WC_ID, WC_STATUS
from mooncake_hpc.segment import BufferDescriptor, DeviceDescriptor, SegmentDescriptor
from mooncake_hpc.settings import Settings
from mooncake_hpc.topology import Topology
from mooncake_hpc.transports.base import Peer, Registration, Transport
from mooncake_hpc.transports.lane import SHARED_KERNELS
from mooncake_hpc.transports.rdma.lane import RdmaLane, RdmaRoute
from mooncake_hpc.transports.rdma.rail import RailBlock
from mooncake_hpc.transports.rdma.regions import KeyTables, remote_rows
from mooncake_hpc.transports.rdma.verbs import Calls

DEVICE = DeviceDescriptor("none", "00:" * 15 + "01", 0)
BATCHES = 500  # a round
WORD = types.int64


@cfunc(types.int32(WORD, WORD, WORD), cache=True)
def post(_qp, _wr, _bad):  # type: ignore[no-untyped-def]
    """As post_send of a device that takes everything."""
    return 0


@cfunc(types.int32(WORD, WORD, WORD), cache=True)
def poll(rail, most, wcs):  # type: ignore[no-untyped-def]
    """As poll_cq: the last work request of each queue pair with something under way has completed."""
    count = 0
    for number in range(get(rail + rails.RAIL_QP_COUNT)):
        qp = get(get(rail + rails.RAIL_QPS) + 8 * number)
        if get(qp + rails.QP_POSTED) != get(qp + rails.QP_RETIRED) and count < most:
            put(wcs + 48 * count + WC_ID, (get(qp + rails.QP_POSTED) - 1) << 8 | number)
            put(wcs + 48 * count + WC_STATUS, SUCCESS)
            count += 1
    return count


class NoRail(RailBlock):
    """A rail without a device."""

    def __init__(self, settings: Settings) -> None:
        calls = Calls(qp=0, post=post.address, cq=0, poll=poll.address, notify=0)
        super().__init__([calls] * settings.rdma.queue_pairs, settings.rdma.max_wr, 0, 0)
        self.words[rails.RAIL_CQ // 8] = self.address


class NoopLane(RdmaLane):
    def interrupt(self) -> None:
        return

    def repair(self) -> None:
        self._rails = [NoRail(self._settings)]  # type: ignore[list-item]
        self._list_rails()
        layout.go_up(self.address)

    def fail_queue(self, code: int) -> None:
        native.fail_queue(self.address, code)


class NoopTransport(Transport):
    """Registrations and routes as of RDMA, with keys that nobody looks at."""

    name = "noop"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
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
        lane = NoopLane(peer, [], Topology({}), nothing, self._regions, keys, self._settings)
        return RdmaRoute(lane, keys, self._regions, self._settings)

    def close(self) -> None:
        return


def make(_protocol: str, listener: Any, _host: str, settings: Settings, _devices: object) -> list[Transport]:
    listener.close()
    return [NoopTransport(settings)]


def measure(batch: int, size: int, rounds: int) -> list[tuple[float, float]]:
    """Nanoseconds an operation, (of time, of this thread's processor time) a round."""
    store = "memory://verbs-noop"
    with (
        mock.patch("mooncake_hpc.engine.make_transports", make),
        TransferEngine("there:1", store, protocol="rdma", bind_address="127.0.0.1") as there,
        TransferEngine("here:1", store, protocol="rdma", bind_address="127.0.0.1") as here,
    ):
        theirs, ours = there.allocate(batch * size), here.allocate(batch * size)
        segment = here.open_segment(there.name)
        requests = np.zeros(batch, REQUEST)
        requests["opcode"], requests["target_id"], requests["length"] = WRITE, segment.id, size
        requests["local_addr"] = ours.ctypes.data + size * np.arange(batch)
        requests["remote_addr"] = theirs.ctypes.data + size * np.arange(batch)
        figures = []
        for _ in range(rounds + 1):
            begin, busy = time.perf_counter_ns(), time.thread_time_ns()
            for _ in range(BATCHES):
                here.submit(requests).wait(10)
            spent = time.perf_counter_ns() - begin, time.thread_time_ns() - busy
            figures.append((spent[0] / (BATCHES * batch), spent[1] / (BATCHES * batch)))
        moved = sum(here.lane_bytes().values())
        if moved != (rounds + 1) * BATCHES * batch * size:
            raise SystemExit(f"only {moved} bytes were counted")
        return figures[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    elapsed, busy = zip(*measure(options.batch, options.size, options.rounds), strict=True)
    result = {
        "batch": options.batch,
        "bytes": options.size,
        "ns_per_operation": summary(elapsed),
        "processor_ns_per_operation": summary(busy),
    }
    print(json.dumps(result))


def summary(figures: Sequence[float]) -> dict[str, float]:
    named = {"least": min(figures), "median": statistics.median(figures), "most": max(figures)}
    return {name: round(value, 1) for name, value in named.items()}


if __name__ == "__main__":
    main()
