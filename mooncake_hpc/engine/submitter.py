"""From the caller's request arrays to batches in lanes' queues."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.errors import ConfigError, PeerLost, TransferError, TransferTimeout
from mooncake_hpc.core.memory import data_address
from mooncake_hpc.core.request import REQUEST, Requests
from mooncake_hpc.engine import slice_kernels as slicer
from mooncake_hpc.engine.arena import DONE_AT, Arena, ArenaPool
from mooncake_hpc.engine.batch import NATIVE_CALL, Batch
from mooncake_hpc.engine.remote_segment import Segment
from mooncake_hpc.engine.slicing import Slicing
from mooncake_hpc.transports import queue_kernels as layout
from mooncake_hpc.transports.base import Registration, Tables
from mooncake_hpc.transports.queue import Lane

Times = npt.NDArray[np.int64]  # one a request
Lanes = list[Lane | None]
LONGEST = 1e9  # seconds
TARGET_MASK = (1 << slicer.TARGET_BITS) - 1
WORD, QUEUED, STARTED = layout.WORD // 8, layout.QUEUED // 8, layout.STARTED // 8


class Record(NamedTuple):
    """Where the times of repeated batches go, in ns; addresses are those that `slicer.repeat` takes."""

    limit: int  # batches
    batches: int = 0
    rows: int = 0
    every: int = 0
    arrays: tuple[Times, Times | None] | None = None

    def note(self, done: int, begin: int, end: int, timed: bool) -> None:
        """Batch number `done`, which a native call did not bring to its end, has; its requests' times were taken."""
        if self.arrays is not None:
            latencies, rows = self.arrays
            latencies[done] = end - begin
            if rows is not None and timed:
                rows[done // self.every] -= begin

    def drop(self, done: int, timed: bool) -> None:
        """It has failed."""
        if self.arrays is not None and (rows := self.arrays[1]) is not None and timed:
            rows[done // self.every] = 0


ONCE = Record(1)


def record_of(latencies: Times, rows: Times | None, count: int) -> Record:
    """For batches of `count` requests. ConfigError tells what is wrong with an array."""
    if latencies.dtype != np.int64 or latencies.ndim != 1 or not latencies.flags.carray:
        raise ConfigError("latencies must be a contiguous, writable, one-dimensional array of int64")
    limit, batches = len(latencies), data_address(latencies)
    if rows is None:
        return Record(limit, batches, arrays=(latencies, None))
    if rows.dtype != np.int64 or rows.ndim != 2 or rows.shape[1] != count or not rows.flags.carray or not len(rows):
        raise ConfigError(f"request_latencies must be a contiguous, writable array of int64, in rows of {count}")
    return Record(limit, batches, data_address(rows), -(-limit // len(rows)), (latencies, rows))


class Submitter:
    """One an engine; thread-safe. The usual case, one peer by one lane, is a single native call."""

    def __init__(self, segments: Mapping[int, Segment], replaced: Mapping[int, str], patience: float) -> None:
        """`segments` by id, and the names of `replaced` ones, stay the engine's; `patience` in seconds is for callers
        that name no timeout."""
        self._segments, self._replaced, self._patience = segments, replaced, patience
        self._arenas = ArenaPool()
        self._block = np.zeros(slicer.ENGINE_WORDS, np.int64)  # for `slicer.submit`
        self._address = int(self._block.ctypes.data)
        self._routes = np.zeros(0, np.int64)
        # By target id the first lane of the first route. A new list for each change: who holds one keeps its lanes.
        self._lanes: Lanes = []
        self._tables: Tables | None = None
        self._held: tuple[Registration, ...] = ()
        self._closed = False

    def set_memory(self, tables: Tables, registrations: tuple[Registration, ...]) -> None:
        """What may be read and written here from now on."""
        self._block[:2] = tables.pair
        self._tables, self._held = tables, registrations

    def set_segments(self) -> None:
        """Take over which segments are open and which were replaced."""
        count = len(self._segments) + len(self._replaced)
        found = [self._segments.get(number) for number in range(count)]
        lanes = [segment.routes[0].lanes[0] if segment is not None else None for segment in found]
        routes = np.array([segment.routes[0].address if segment is not None else 0 for segment in found], np.int64)
        self._lanes = lanes
        self._block[slicer.SEGMENTS // 8] = routes.ctypes.data
        self._block[slicer.SEGMENT_COUNT // 8] = len(routes)
        self._routes = routes

    def close(self) -> None:
        """Once no lane carries anything any more: from now on nothing is taken, and no memory kept."""
        self._closed, self._held = True, ()

    def submit(self, requests: Requests, timeout: float | None, done_at: Times | None) -> Batch:
        """As `TransferEngine.submit`."""
        arena, held, lanes = self._take(requests, done_at), (self._held, done_at), self._lanes
        try:
            number = slicer.submit(arena.address, arena.count, self._address)
            if number > 0:
                return self._batch(arena, number, held, lanes)
        except BaseException:  # Ctrl-C, and nobody has the batch
            self._cancel(arena, held, lanes)
            raise
        return self._submit_slowly(arena, self._patience if timeout is None else timeout, held)

    def transfer(self, requests: Requests, timeout: float | None, done_at: Times | None) -> None:
        """As `TransferEngine.transfer`."""
        self._run(requests, timeout, done_at, ONCE)

    def repeat(
        self, requests: Requests, latencies: Times, seconds: float, timeout: float | None, rows: Times | None
    ) -> int:
        """As `TransferEngine.repeat`."""
        until, done = time.monotonic_ns() + int(min(seconds, LONGEST) * 1e9), 0
        record = record_of(latencies, rows, np.size(requests))
        while done < record.limit:
            done = self._run(requests, timeout, None, record, done, until)
            if time.monotonic_ns() >= until:
                break
        return done

    def _run(
        self, requests: Requests, timeout: float | None, done_at: Times | None, record: Record, done: int = 0,
        until: int = 0,
    ) -> int:  # fmt: skip
        """As `slicer.repeat`, for NATIVE_CALL at most, and the last one to its end. A batch that ends natively never
        becomes an object."""
        arena, held, begin = self._take(requests, done_at), (self._held, done_at, record), time.monotonic_ns()
        lanes = self._lanes  # held as long as the native call, which lets go of the GIL, may look at one
        patience = int((self._patience if timeout is None else timeout) * 1e9)
        call = NATIVE_CALL if patience > NATIVE_CALL else patience
        until = begin + NATIVE_CALL if until > begin + NATIVE_CALL else until
        try:
            done = int(
                slicer.repeat(
                    arena.address, arena.count, self._address, done, record.limit, until, call,
                    record.batches, record.rows, record.every,
                )
            )  # fmt: skip
            queued, started, timed = arena.words[QUEUED], arena.words[STARTED], arena.words[DONE_AT] != 0
            batch = self._batch(arena, queued, held, lanes) if queued > 0 else None
        except BaseException:  # Ctrl-C, and nobody has the batch
            self._cancel(arena, held, lanes)
            raise
        if not queued:
            self._arenas.give(arena)
            return done
        end = started + patience
        if batch is None:
            batch = self._submit_slowly(arena, patience / 1e9, held)
        try:
            if not batch.join(max(0, end - time.monotonic_ns()) / 1e9):
                text = f"{batch.describe()} is not done after {patience / 1e9:g} s: cancelled"
                raise TransferTimeout(text + batch.why_late())
            batch.wait()
        except BaseException as error:
            batch.cancel()
            record.drop(done, timed)
            if isinstance(error, TransferError):
                error.failed = int(np.count_nonzero(batch.status < 0))
            raise
        record.note(done, started, time.monotonic_ns(), timed)
        return done + 1

    def _take(self, requests: Requests, done_at: Times | None) -> Arena:
        usual = getattr(requests, "dtype", None) is REQUEST and requests.ndim == 1  # quicker than what follows
        if not usual and not (isinstance(requests, np.ndarray) and requests.ndim == 1 and requests.dtype == REQUEST):
            raise ConfigError("a transfer takes a one-dimensional array of dtype mooncake_hpc.REQUEST")
        return self._arenas.take(requests, done_at)

    def _batch(self, arena: Arena, number: int, held: object, lanes: Lanes) -> Batch:
        """The batch of what `slicer.submit` has queued, by the lanes of before. It holds the registrations, so that
        memory outlives it."""
        lane = lanes[number & TARGET_MASK]
        assert lane is not None  # the kernel takes nothing for a segment that was replaced
        batch = Batch(arena, self._arenas, [lane], held)
        lane.keep(number >> slicer.TARGET_BITS, batch)
        return batch

    def _submit_slowly(self, arena: Arena, limit: float, held: object) -> Batch:
        if self._closed:
            raise PeerLost("this engine is closed")
        slicing = Slicing(arena, self._address)
        slicing.run(self._segments, self._replaced)
        batch = Batch(arena, self._arenas, [], (held, slicing.held))
        batch.start(slicing.parts, time.monotonic() + limit)
        return batch

    def _cancel(self, arena: Arena, held: object, lanes: Lanes) -> None:
        """Cancel what `slicer.submit` may have queued. The arena is not used again: others may have seen it."""
        words, target = arena.words, int(arena.requests["target_id"][0])
        queued = words[layout.REMAINING // 8] != 0 or words[WORD] & 1
        lane = lanes[target] if queued and 0 <= target < len(lanes) else None
        if lane is None:
            return
        batch = Batch(arena, ArenaPool(), [lane], held)
        lane.keep(lane.queued, batch)
        batch.cancel()
