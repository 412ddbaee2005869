"""A rail: an endpoint as the lane's kernel sees it, with the work requests that were built once."""

from __future__ import annotations

import os
import time

import numpy as np
import numpy.typing as npt

from mooncake_hpc.transports.queue_kernels import TIMED_OUT
from mooncake_hpc.transports.rdma import rail_kernels as rails
from mooncake_hpc.transports.rdma import verbs
from mooncake_hpc.transports.rdma import verbs_kernels as layout
from mooncake_hpc.transports.rdma.endpoint import Endpoint
from mooncake_hpc.transports.rdma.paths import Path
from mooncake_hpc.transports.rdma.verbs import Calls

# statuses of completions that say nothing of the path: the request was at fault, or we ended it ourselves
INNOCENT = (layout.SUCCESS, layout.FLUSHED, layout.LOCAL_PROTECTION, layout.REMOTE_ACCESS)


def build_ring(depth: int) -> npt.NDArray[np.int64]:
    """`depth` struct ibv_send_wr in a ring, each with one scatter entry; those lie behind them."""
    words, entries = layout.WR // 8, layout.SGE // 8
    ring = np.zeros(depth * (words + entries), np.int64)
    base = int(ring.ctypes.data)
    requests = ring[: depth * words].reshape(depth, words)
    numbers = np.arange(depth, dtype=np.int64)
    requests[:, layout.WR_NEXT // 8] = base + layout.WR * ((numbers + 1) % depth)
    requests[:, layout.WR_SGES // 8] = base + layout.WR * depth + layout.SGE * numbers
    return ring


class QueuePairBlock:
    """The block of a queue pair."""

    def __init__(self, calls: Calls, depth: int) -> None:
        self._ring = build_ring(depth)
        self._slots = np.zeros(2 * depth, np.int64)
        self.words = np.zeros(rails.QP_WORDS, np.int64)
        self.words[rails.QP // 8] = calls.qp
        self.words[rails.QP_POST // 8] = calls.post
        self.words[rails.QP_DEPTH // 8] = depth
        self.words[rails.QP_WRS // 8] = self._ring.ctypes.data
        self.words[rails.QP_SLOTS // 8] = self._slots.ctypes.data


class RailBlock:
    """The block of a rail over queue pairs that share a completion queue."""

    def __init__(self, calls: list[Calls], depth: int, local: int, remote: int) -> None:
        """`local` and `remote` are the devices' indices in the rows of keys."""
        self._pairs = [QueuePairBlock(each, depth) for each in calls]
        self._addresses = np.array([pair.words.ctypes.data for pair in self._pairs], np.int64)
        self.words = np.zeros(rails.RAIL_WORDS, np.int64)
        self.address = int(self.words.ctypes.data)
        for word, value in (
            (rails.RAIL_STATE, rails.LIVE),
            (rails.RAIL_CQ, calls[0].cq),
            (rails.RAIL_POLL, calls[0].poll),
            (rails.RAIL_NOTIFY, calls[0].notify),
            (rails.RAIL_QPS, int(self._addresses.ctypes.data)),
            (rails.RAIL_QP_COUNT, len(calls)),
            (rails.LOCAL_KEY, 8 + 8 * local),
            (rails.REMOTE_KEY, 8 + 8 * remote),
            (rails.LOCAL_BIT, 1 << local),
            (rails.REMOTE_BIT, 1 << remote),
        ):
            self.words[word // 8] = value

    def get(self, word: int) -> int:
        return int(self.words[word // 8])

    @property
    def state(self) -> int:
        return self.get(rails.RAIL_STATE)


class Rail(RailBlock):
    """A rail over an endpoint."""

    def __init__(self, path: Path, endpoint: Endpoint) -> None:
        super().__init__(endpoint.calls(), endpoint.depth, path.local, path.remote)
        self.path, self.endpoint = path, endpoint
        self.flushed_at = 0.0
        self._delivered = 0

    @property
    def flushing(self) -> bool:
        return self.get(rails.RAIL_FLUSHING) != 0

    @property
    def faulty(self) -> bool:
        """Whether what broke it is the path's fault."""
        return self.get(rails.RAIL_CAUSE) not in INNOCENT

    def flush(self, lane: int) -> None:
        """Post nothing more, have everything under way come back; any thread may call it."""
        rails.spoil(lane, self.address, layout.FLUSHED, 0)
        self.endpoint.to_error()
        if not self.flushing:
            self.flushed_at = time.monotonic()
            self.words[rails.RAIL_FLUSHING // 8] = 1

    def note_use(self) -> None:
        """Tell the endpoint when something was carried since the last call: the pool evicts others first."""
        delivered = self.get(rails.RAIL_DELIVERED)
        if delivered != self._delivered:
            self._delivered = delivered
            self.endpoint.used = True

    def explain(self) -> str:
        """What broke it."""
        cause, vendor = self.get(rails.RAIL_CAUSE), self.get(rails.RAIL_VENDOR)
        if cause == TIMED_OUT:
            text = "no completion and no error either"
        elif cause == layout.FLUSHED:
            text = "the connection was given up"
        elif cause < 0:
            text = f"the device refuses work: {os.strerror(-cause)}"
        else:
            text = f"{verbs.STATUS_NAMES.get(cause, f'status {cause}')}" + (f" (vendor {vendor:#x})" if vendor else "")
        return f"{self.endpoint.local_path} to {self.endpoint.peer_path}: {text}"
