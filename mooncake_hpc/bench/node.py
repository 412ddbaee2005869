"""The two ends of a bench over one engine: a target that publishes buffers, an initiator that addresses them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mooncake_hpc.bench.plan import BenchConfig, Remote, build_requests, check_room
from mooncake_hpc.bench.runner import Measured, Runner, transfer
from mooncake_hpc.bench.verify import PREPARE_TIMEOUT, Bytes, Verifier, spans_of
from mooncake_hpc.errors import ConfigError, TransferError

if TYPE_CHECKING:
    from mooncake_hpc import TransferEngine
    from mooncake_hpc.workers.pool import WorkerPool

MIN_BUFFERS = 2  # the original's initiator indexes a target's buffers by its own number of NUMA nodes
CPU_QUESTION, CPU_ANSWER = "mooncake_hpc.bench.cpu?", "mooncake_hpc.bench.cpu"
ANSWER_TIMEOUT = 1.0  # seconds; the original never answers


def numa_nodes() -> int:
    """NUMA nodes of this machine, at least 1."""
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))


@dataclass(slots=True)
class Result:
    """One initiator's row of the report; travels to rank 0."""

    name: str
    targets: list[str]
    measured: Measured
    transports: list[str]
    lane_bytes: dict[str, int]  # during warm-up, run and verification
    target_cpu_seconds: float | None = None  # None: unknown
    rank: int = 0
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)


class Target:
    """Publishes buffers and waits. `regions` initiators address it, each a region of its own."""

    def __init__(self, engine: TransferEngine, config: BenchConfig, regions: int = 1) -> None:
        self._engine = engine
        nodes = numa_nodes()
        size = max(config.buffer_size, regions * config.footprint)
        self.buffers: list[Bytes] = [
            engine.allocate(size, location=f"cpu:{i % nodes}") for i in range(max(MIN_BUFFERS, nodes))
        ]

    def serve(self) -> None:
        """Answer initiators' questions; call a few times a second."""
        for name, text in self._engine.notifications():
            if name == CPU_QUESTION:
                try:
                    self._engine.notify(text, CPU_ANSWER, f"{self._engine.name} {time.process_time():.6f}")
                except (ConfigError, OSError, TransferError, LookupError):
                    continue  # an initiator that ended meanwhile


class Initiator:
    """Connects to targets, warms up and runs; `regions[i]` is our region in `targets[i]`."""

    def __init__(
        self, engine: TransferEngine, config: BenchConfig, targets: Sequence[str], regions: Sequence[int]
    ) -> None:
        self._engine, self._config, self._targets = engine, config, list(targets)
        if config.batch_size * config.threads < len(targets):
            raise ConfigError(
                f"batch_size {config.batch_size} × threads {config.threads} is less than the {len(targets)} targets"
            )
        nodes = numa_nodes()
        self._segments = [engine.open_segment(name) for name in targets]
        used = min(nodes, config.threads, *(len(s.buffers) for s in self._segments))
        if used == 0:
            empty = next(s.name for s in self._segments if not s.buffers)
            raise ConfigError(f"segment {empty} has no buffers: is it a bench target?")
        for segment, region in zip(self._segments, regions, strict=True):
            for index in range(used):
                check_room(config, segment.name, index, segment.buffers[index].length, region)
        self._buffers: list[Bytes] = [
            engine.allocate(config.footprint, location=f"cpu:{i}", remote_accessible=False) for i in range(used)
        ]
        self._regions = list(regions)
        self._batches = [self._requests(thread, used) for thread in range(config.threads)]
        self._runner = Runner(engine, config, self._batches)

    def _requests(self, thread: int, used: int) -> Any:
        """A submitter keeps to one buffer on both sides, as in the original: thread modulo NUMA nodes."""
        index = thread % used
        remotes = [
            Remote(segment.id, segment.buffers[index].address + region * self._config.footprint)
            for segment, region in zip(self._segments, self._regions, strict=True)
        ]
        return build_requests(self._config, thread, self._buffers[index].ctypes.data, remotes)

    def warm_up(self, pool: WorkerPool) -> None:
        """Fault in our pages, connect, and run untimed batches; raises what goes wrong."""
        for buffer in self._buffers:
            pool.touch(buffer).wait(PREPARE_TIMEOUT)
        self._runner.warm_up()

    def run(self, pool: WorkerPool) -> Result:
        """The timed run, with verification if configured."""
        verifier = self._verifier(pool) if self._config.verify else None
        measured = self._runner.run(verifier)
        return Result(
            name=self._engine.name,
            targets=self._targets,
            measured=measured,
            transports=sorted({segment.transport for segment in self._segments}),
            lane_bytes=self._engine.lane_bytes(),
        )

    def _verifier(self, pool: WorkerPool) -> Verifier:
        local = [(buffer.ctypes.data, buffer) for buffer in self._buffers]
        spans = spans_of(local, self._batches, self._regions[0] * self._config.footprint)

        def move(requests: Any) -> None:
            transfer(self._engine, requests, self._config.timeout + requests["length"].sum() * 1e-9)

        return Verifier(self._config, pool, move, spans, self._batches)

    def target_cpu(self) -> float | None:
        """CPU seconds that the targets used so far, all together; None unless all of them are ours and answer."""
        for name in self._targets:
            try:
                self._engine.notify(name, CPU_QUESTION, self._engine.name)
            except (ConfigError, OSError, TransferError):
                return None
        return collect_answers(self._engine.notifications, set(self._targets))


def collect_answers(notifications: Callable[[], list[tuple[str, str]]], waiting: set[str]) -> float | None:
    """Sum of the CPU seconds that the targets in `waiting` answer; None if one does not in ANSWER_TIMEOUT."""
    total, deadline = 0.0, time.monotonic() + ANSWER_TIMEOUT
    while waiting:
        for name, text in notifications():
            target, _, seconds = text.rpartition(" ")
            if name == CPU_ANSWER and target in waiting:
                waiting.discard(target)
                total += float(seconds)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)
    return total
