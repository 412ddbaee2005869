"""Buffer preparation by several processes: `WorkerPool` splits arrays in memory files into pieces.

The process that waits for a job works on it too, so a pool of 0 workers, one whose workers are still starting and
one whose workers were just killed all give the same results. Small arrays, and arrays outside memory files, are
done at once in the calling thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

import numpy as np

from mooncake_hpc.core import process
from mooncake_hpc.core.errors import ConfigError, TransferTimeout, WorkerError
from mooncake_hpc.core.memory import Bytes, MemoryFile, containing
from mooncake_hpc.native import prepare
from mooncake_hpc.workers import ring_kernels as ring
from mooncake_hpc.workers.process import WorkerProcess

MOST = 64  # workers
PIECE = 1 << 20  # bytes at least: about 50 µs of work, what waking a sleeping worker costs
PAGE = 4096
TICK = 20_000_000  # ns between two looks at the workers while waiting

log = logging.getLogger(__name__)

Finish = Callable[[Sequence[int]], int | None]


def default_count() -> int:
    """Cores that this process may use, less one for itself, at most 4."""
    return min(4, len(os.sched_getaffinity(0)) - 1)


class Job:
    """Work that was submitted. Its arrays and their memory files must stay open until it is done; wait for it."""

    def __init__(self, finish: Finish, arrays: tuple[Bytes, ...] = ()) -> None:
        self._process = process.here
        self._finish, self._arrays = finish, arrays
        self._pool: WorkerPool | None = None
        self._number = self._pieces = -1
        self._results: list[int] | None = None
        self._value: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Help until the job is done; its result: wrong bytes of `verify`, the sum of `checksum`, else 0.

        Raises TransferTimeout after `timeout` seconds, after which the job is still running, and WorkerError when
        workers keep dying.
        """
        process.check(self)
        deadline = None if timeout is None else time.monotonic_ns() + int(timeout * 1e9)
        while self._results is None:
            left = TICK if deadline is None else deadline - time.monotonic_ns()
            if not self._advance(min(TICK, max(0, left))) and left <= 0:
                raise TransferTimeout(f"a worker job of {self._pieces} pieces is not done after {timeout:g} s")
        if self._value is None:
            self._value = self._finish(self._results) or 0
        return self._value

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once. Does none of the work."""
        process.check(self)
        return self._results is not None or (self._pool is not None and self._pool._look(self))

    def _advance(self, nanoseconds: int) -> bool:
        assert self._pool is not None
        return self._pool._help(self, nanoseconds)


class WorkerPool:
    """`count` worker processes (default: cores less one, at most 4; 0 does everything in this process).

    A worker that dies is replaced and what it held is done again, up to `respawns` times a minute; then jobs raise
    WorkerError. Any thread may submit and wait. A context manager.
    """

    def __init__(self, count: int | None = None, *, respawns: int = 16) -> None:
        count = default_count() if count is None else count
        if not 0 <= count <= MOST:
            raise ConfigError(f"{count} workers: expected 0 to {MOST}")
        self._process = process.here
        self._lock = threading.RLock()
        self._respawns, self._deaths = respawns, list[float]()
        self._failure = ""
        self._jobs: list[Job | None] = [None] * ring.JOBS
        self._next = 0
        self._control = MemoryFile(ring.CONTROL_BYTES, "mooncake-workers")
        self._words: Bytes | None = self._control.array  # keeps the mapping for jobs that outlive close()
        self._address = self._control.address
        self._workers: list[WorkerProcess] = []
        # compiled here, once and for the cache: each worker alone would need seconds and 30 MB more
        if count:
            ring.serve(self._address, MOST, ring.HERE, 0, 0, 0)
        try:
            for owner in range(1, count + 1):
                self._workers.append(WorkerProcess(owner, self._control))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """The worker processes of this moment."""
        process.check(self)
        return [worker.pid for worker in self._workers]

    def fill(self, array: Bytes, seed: int, offset: int = 0, round: int = 0) -> Job:
        """`native.prepare.fill` by all workers."""
        process.check(self)
        key = prepare.pattern_key(seed, round)
        local = partial(prepare.fill, array, seed, offset, round)
        return self._whole(ring.FILL, array, local, p=int(key), q=offset, write=True)

    def verify(self, array: Bytes, seed: int, offset: int = 0, round: int = 0) -> Job:
        """`native.prepare.verify` by all workers; the job's result is the number of wrong bytes."""
        process.check(self)
        key = prepare.pattern_key(seed, round)
        local = partial(prepare.verify, array, seed, offset, round)
        return self._whole(ring.VERIFY, array, local, p=int(key), q=offset)

    def checksum(self, array: Bytes) -> Job:
        """`native.prepare.checksum` by all workers; the job's result is the checksum."""
        process.check(self)
        finish = partial(prepare.finish_checksum, nbytes=array.nbytes)
        return self._whole(ring.CHECKSUM, array, partial(prepare.checksum, array), finish)

    def touch(self, array: Bytes, write: bool = True) -> Job:
        """`native.prepare.touch`: the workers allocate the pages, `wait` maps them into this process."""
        process.check(self)
        local = partial(prepare.touch, array, write)
        return self._whole(ring.TOUCH, array, local, lambda _: local(), p=int(write), write=write)

    def poison(self, array: Bytes, value: int = 0xA5) -> Job:
        """`native.prepare.poison` by all workers."""
        process.check(self)
        return self._whole(ring.POISON, array, partial(prepare.poison, array, value), p=value, write=True)

    def gather(self, source: Bytes, destination: Bytes, block: int, stride: int, count: int) -> Job:
        """`native.prepare.gather` by all workers. The arrays must not overlap."""
        process.check(self)
        prepare.check_blocks(source, destination, block, stride, count)
        local = partial(prepare.gather, source, destination, block, stride, count)
        return self._submit(ring.GATHER, (source, destination), local, sum, count, block, block, stride)

    def scatter(self, source: Bytes, destination: Bytes, block: int, stride: int, count: int) -> Job:
        """`native.prepare.scatter` by all workers. The arrays must not overlap."""
        process.check(self)
        prepare.check_blocks(destination, source, block, stride, count)
        local = partial(prepare.scatter, source, destination, block, stride, count)
        return self._submit(ring.SCATTER, (source, destination), local, sum, count, block, block, stride)

    def close(self, timeout: float = 5.0) -> None:
        """End the workers, by force after `timeout` seconds. Unfinished jobs are done by who waits for them.

        In a forked child nothing happens.
        """
        if self._process is not process.here:
            return
        with self._lock:
            workers, self._workers = self._workers, []
            words = self._words
        if words is not None:
            self._end(workers, time.monotonic() + timeout)
        with self._lock:
            self._control.close()
            self._unmap()

    def _unmap(self) -> None:
        """Give up the ring once the pool is closed and nobody has a job in it."""
        if not self._workers and not any(self._jobs):
            self._words = None

    def _end(self, workers: list[WorkerProcess], deadline: float) -> None:
        for worker in workers:
            worker.stop()
        ring.ring_bell(self._address + ring.BELL)
        for worker in workers:
            worker.end(deadline)
            ring.release(self._address, worker.owner)

    def __enter__(self) -> WorkerPool:
        process.check(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _whole(
        self,
        kind: int,
        array: Bytes,
        local: Callable[[], int | None],
        finish: Finish = sum,
        *,
        p: int = 0,
        q: int = 0,
        write: bool = False,
    ) -> Job:
        prepare.address_of(array, write)
        return self._submit(kind, (array, array), local, finish, array.nbytes, 1, p, q)

    def _submit(
        self,
        kind: int,
        arrays: tuple[Bytes, Bytes],
        local: Callable[[], int | None],
        finish: Finish,
        total: int,
        unit: int,
        p: int,
        q: int,
    ) -> Job:
        """Split `total` units of `unit` bytes into pieces and post them, or call `local` where that is better."""
        job = Job(finish, arrays)
        pieces = min(ring.PIECES, total * unit // PIECE)
        if pieces >= 2:
            step = -(-total // pieces)
            if unit == 1:
                step = -(-step // PAGE) * PAGE
            with self._lock:
                self._reap()
                addresses = [prepare.address_of(array) for array in arrays]
                files = [self._share(array) for array in arrays]
                if self._workers and all(files):
                    words = kind, total, step, -(-total // step), files[0], addresses[0], files[1], addresses[1], p, q
                    self._post(job, [*words, 0])
                    return job
        job._value, job._results = local() or 0, []
        return job

    def _share(self, array: Bytes) -> int:
        """Serial number of the memory file around `array`, once all workers were told of it; 0: none."""
        file = containing(prepare.address_of(array), array.nbytes)
        return file.serial if file and all([worker.attach(file) for worker in self._workers]) else 0

    def _post(self, job: Job, words: Sequence[int]) -> None:
        number = self._next
        before = self._jobs[number % ring.JOBS]
        while before is not None and before._results is None:
            self._help(before, TICK)
        self._next += 1
        job._pool, job._number, job._pieces = self, number, words[3]
        self._jobs[number % ring.JOBS] = job
        fields = np.array([word & prepare.MASK for word in words], np.uint64).view(np.int64)
        ring.post(self._address, number, fields, job._pieces)

    def _help(self, job: Job, nanoseconds: int) -> bool:
        """Work on `job`, then sleep, until it is done (True) or the time is over."""
        with self._lock:
            words = self._words  # held while the kernel runs
        if words is None or job._results is not None:
            return True
        done = bool(ring.help_and_wait(self._address, job._number, nanoseconds))
        with self._lock:
            return self._collect(job) if done else self._reap()

    def _look(self, job: Job) -> bool:
        with self._lock:
            if job._results is None and ring.finished(ring.slot(self._address, job._number), job._number):
                self._collect(job)
            else:
                self._reap()
            return job._results is not None

    def _collect(self, job: Job) -> bool:
        """Take the results of a finished job out of its slot, for whichever thread comes first."""
        if job._results is None and self._words is not None:
            start = ring.slot(self._address, job._number) + ring.RESULTS - self._address
            job._results = self._words[start : start + 8 * job._pieces].view(np.int64).tolist()
            job._arrays = ()
            self._jobs[job._number % ring.JOBS] = None
            ring.set_tail(self._address, min((j._number for j in self._jobs if j), default=self._next))
            self._unmap()
        return True

    def _reap(self) -> bool:
        """Replace workers that died and put back what they held. Raises WorkerError when too many did; False."""
        for index, worker in enumerate(tuple(self._workers)):
            status = worker.exit_status()
            if status is not None and not self._failure:
                worker.end(0)
                ring.release(self._address, worker.owner)
                self._replace(index, f"worker {worker.owner} (pid {worker.pid}) ended with status {status}")
        if self._failure:
            raise WorkerError(self._failure)
        return False

    def _replace(self, index: int, cause: str) -> None:
        now = time.monotonic()
        self._deaths = [when for when in self._deaths if when > now - 60] + [now]
        if len(self._deaths) > self._respawns:
            self._failure = (
                f"{len(self._deaths)} workers died within a minute; the last: {cause}. "
                "See their messages on stderr; a pool of 0 workers does without them"
            )
            workers, self._workers = self._workers, []
            self._end(workers, now)
            return
        log.warning("%s; starting another", cause)
        worker = WorkerProcess(self._workers[index].owner, self._control)
        self._workers[index] = worker
        for array in [array for job in self._jobs if job for array in job._arrays]:
            if file := containing(prepare.address_of(array), array.nbytes):
                worker.attach(file)
