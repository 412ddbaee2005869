"""The timed part of a bench: N submitters that submit their batch again and again, and what they measured."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mooncake_hpc.bench.plan import BenchConfig
from mooncake_hpc.bench.statistics import Histogram
from mooncake_hpc.bench.verify import Verifier
from mooncake_hpc.core.errors import MooncakeError, TransferCancelled, TransferError

Requests = npt.NDArray[Any]
Times = npt.NDArray[np.int64]
CALL = 0.25, 2  # seconds, and batches' times, of a call of the engine, whichever is more; after one peers are asleep
COUNTED = 1 << 15  # batches of a call at most
TIMED = 256  # batches, at least, to one whose requests are timed, which costs 25 ns a request
TIMES = 1 << 16  # of requests a call, at most, but for one batch
PROGRESS = 5.0  # seconds between two words about a verified run
LAST_BATCH = 0.5  # seconds for a submitter to end after Ctrl-C
Tell = Callable[[str], object]
WALL_FACTOR, WALL_EXTRA = 4, 10.0  # a verified run ends at the latest after duration × factor + extra seconds


def longest_run(config: BenchConfig) -> float:
    """Seconds after which `Runner.run` starts no further batch."""
    return WALL_FACTOR * config.duration + WALL_EXTRA if config.verify else config.duration


class Engine(Protocol):
    """What the runner needs of `mooncake_hpc.TransferEngine`."""

    def transfer(self, requests: Requests, timeout: float | None = None) -> None: ...

    def repeat(
        self,
        requests: Requests,
        latencies: Times,
        seconds: float,
        timeout: float | None = None,
        request_latencies: Times | None = None,
    ) -> int: ...


@dataclass(slots=True)
class Measured:
    """What one initiator measured. `seconds` is the time inside the timed windows, as is `cpu_seconds`."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    batches: int = 0
    errors: int = 0  # failed requests
    failure: str = ""  # the first error's text
    latency: Histogram = field(default_factory=Histogram)  # ns a batch
    request_latency: Histogram = field(default_factory=Histogram)  # ns, from the submission of its batch; of a sample
    compared: int = 0
    wrong: int = 0


@dataclass(slots=True)
class _Submitter:
    requests: Requests
    latency: Histogram = field(default_factory=Histogram)  # ns a batch
    request_latency: Histogram = field(default_factory=Histogram)
    batches: int = 0
    begin: int = 0  # of its last window, ns
    end: int = 0

    def count(self, latencies: Times, rows: Times) -> None:
        """Take in what took some time, and make the arrays new."""
        ended = latencies[latencies > 0]
        self.latency.add(ended)
        self.request_latency.add(rows[rows > 0])
        self.batches += len(ended)
        latencies[:] = 0
        rows[:] = 0


class Runner:
    """Runs the submitters of one process; one request array each, built once."""

    def __init__(self, engine: Engine, config: BenchConfig, batches: Sequence[Requests]) -> None:
        self._engine, self._config = engine, config
        self._submitters = [_Submitter(requests) for requests in batches]
        self._stopped = False
        self._lock = threading.Lock()
        self.measured = Measured()
        self._error: Exception | None = None

    def warm_up(self) -> None:
        """Untimed batches of every submitter: connections, page faults on both sides, compiled kernels."""
        if self._config.warmup:
            self._window(self._config.warmup, float("inf"))
        if self._error is not None:
            raise self._error
        self.measured = Measured()
        for submitter in self._submitters:
            submitter.latency, submitter.request_latency, submitter.batches = Histogram(), Histogram(), 0

    def run(self, verifier: Verifier | None = None, tell: Tell | None = None) -> Measured:
        """Run for the configured time. A failed transfer ends the run and is told in the result, not raised.

        `measured` has what came of it, also when it is interrupted.
        """
        try:
            if verifier is None:
                self._window(None, self._config.duration)
            else:
                self._verified(verifier, tell or (lambda line: None))
        finally:
            for submitter in self._submitters:
                self.measured.latency.merge(submitter.latency)
                self.measured.request_latency.merge(submitter.request_latency)
                self.measured.batches += submitter.batches
        if self._error is not None and not isinstance(self._error, MooncakeError):
            raise self._error
        return self.measured

    def _verified(self, verifier: Verifier, tell: Tell) -> None:
        """Windows and comparisons in turn; `tell` hears of them every PROGRESS seconds."""
        measured, duration = self.measured, self._config.duration
        wall_end, told = time.monotonic() + longest_run(self._config), time.monotonic()
        while measured.seconds < duration and self._error is None and time.monotonic() < wall_end:
            verifier.begin()
            self._window(self._config.verify_interval, duration - measured.seconds)
            if self._error is None:
                verifier.check()
            measured.compared, measured.wrong = verifier.compared, verifier.wrong
            if time.monotonic() - told >= PROGRESS:
                told = time.monotonic()
                compared = f"{measured.compared} bytes compared, {measured.wrong} wrong"
                tell(f"{measured.seconds:.1f} of {duration:g} s; {compared}")

    def _window(self, limit: int | None, seconds: float) -> None:
        """All submitters at once until each has done `limit` batches or `seconds` passed; adds the time."""
        start_line = threading.Barrier(len(self._submitters) + 1)
        threads = [
            threading.Thread(
                target=self._submit, args=(s, start_line, limit, seconds), name=f"submitter-{i}", daemon=True
            )
            for i, s in enumerate(self._submitters)
        ]
        for thread in threads:
            thread.start()
        cpu = time.process_time()
        start_line.wait(timeout=60)
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C: each submitter ends after its batch, or when the engine closes
            self._stopped = True
            for thread in threads:
                thread.join(LAST_BATCH)
            raise
        finally:
            elapsed = max(s.end for s in self._submitters) - min(s.begin for s in self._submitters)
            self.measured.seconds += elapsed / 1e9
            self.measured.cpu_seconds += time.process_time() - cpu

    def _submit(self, me: _Submitter, start_line: threading.Barrier, limit: int | None, seconds: float) -> None:
        """One submitter's loop. The clock runs from before the submission to the return of the wait."""
        most = COUNTED if limit is None else min(limit, COUNTED)
        timed, count = -(-most // TIMED), len(me.requests)
        latencies, rows = np.zeros(most, np.int64), np.zeros((max(1, min(timed, TIMES // count)), count), np.int64)
        timeout, call = self._config.batch_timeout, CALL[0]
        start_line.wait(timeout=60)
        me.begin = me.end = time.monotonic_ns()
        last, left = me.begin + seconds * 1e9, math.inf if limit is None else limit
        try:
            while left > 0 and me.end < last and not self._stopped:
                some, begin = latencies[: int(min(most, left))], me.end
                done = self._engine.repeat(me.requests, some, min(call, (last - begin) / 1e9), timeout, rows)
                me.end = time.monotonic_ns()
                me.count(latencies, rows)
                left -= done
                call = max(CALL[0], CALL[1] * (me.end - begin) / 1e9 / done)
        except Exception as error:
            self._fail(error)
            me.end = time.monotonic_ns()
            me.count(latencies, rows)

    def _fail(self, error: Exception) -> None:
        """Keep the first cause and end the run."""
        self._stopped = True
        failed = error.failed if isinstance(error, TransferError) else 1
        with self._lock:
            if self._error is None or isinstance(self._error, TransferCancelled):
                self._error, self.measured.failure = error, f"{type(error).__name__}: {error}"
            self.measured.errors += failed
