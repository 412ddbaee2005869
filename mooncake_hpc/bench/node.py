"""The two ends of a bench over one engine: a target that publishes buffers, an initiator that addresses them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mooncake_hpc.bench.plan import BenchConfig, Remote, build_requests, check_room
from mooncake_hpc.bench.runner import Measured, Runner
from mooncake_hpc.bench.verify import PREPARE_TIMEOUT, Bytes, Verifier, spans_of
from mooncake_hpc.core.errors import ConfigError

if TYPE_CHECKING:
    from mooncake_hpc import TransferEngine
    from mooncake_hpc.workers.pool import WorkerPool

MIN_BUFFERS = 2  # the original's initiator indexes a target's buffers by its own number of NUMA nodes
CPU_BUFFER = "bench-cpu"  # name of a buffer whose first 8 bytes are the target's CPU time so far, ns, int64
CPU_INTERVAL = 0.1  # seconds between two updates of it


def numa_nodes() -> int:
    """NUMA nodes of this machine, at least 1."""
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))


@dataclass(slots=True)
class Result:
    """One initiator's row of the report; travels to rank 0."""

    name: str
    targets: list[str]
    measured: Measured
    transports: list[str]  # those that carried bytes
    lane_bytes: dict[str, int]  # during warm-up, run and verification; lanes that carried any
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

        self._cpu = engine.allocate(4096, location=CPU_BUFFER, writable_by_peers=False).view(np.int64)

    def tick(self) -> None:
        """Publish our CPU time; call every CPU_INTERVAL seconds."""
        self._cpu[0] = time.process_time_ns()


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
        self._segments = [engine.open_segment(name) for name in targets]
        used = min(numa_nodes(), config.threads)
        for segment, region in zip(self._segments, regions, strict=True):
            lengths = [buffer.length for buffer in segment.buffers if buffer.name != CPU_BUFFER]
            if not lengths:
                raise ConfigError(f"segment {segment.name} has no buffers: is it a bench target?")
            used = min(used, len(lengths))
            for index, length in enumerate(lengths[:used]):
                check_room(config, segment.name, index, length, region)
        self._buffers: list[Bytes] = [
            engine.allocate(config.footprint, location=f"cpu:{i}", remote_accessible=False) for i in range(used)
        ]
        self._regions = list(regions)
        self._batches = [self._requests(thread, used) for thread in range(config.threads)]
        self._runner = Runner(engine, config, self._batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Give our buffers back, for an engine that outlives us."""
        self._engine.unregister_many(self._buffers)

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

    @property
    def measured(self) -> Measured:
        """What was measured until now, also by a run that was interrupted."""
        return self._runner.measured

    def run(self, pool: WorkerPool, tell: Callable[[str], None] | None = None) -> Result:
        """The timed run, with verification if configured, whose progress is told from time to time."""
        verifier = self._verifier(pool) if self._config.verify else None
        measured = self._runner.run(verifier, tell)
        lane_bytes = {lane: count for lane, count in self._engine.lane_bytes().items() if count}
        return Result(
            name=self._engine.name,
            targets=self._targets,
            measured=measured,
            transports=sorted({lane.partition("/")[0] for lane in lane_bytes}),
            lane_bytes=lane_bytes,
        )

    def _verifier(self, pool: WorkerPool) -> Verifier:
        local = [(buffer.ctypes.data, buffer) for buffer in self._buffers]
        spans = spans_of(local, self._batches, self._regions[0] * self._config.footprint)

        def move(requests: Any) -> None:
            self._engine.transfer(requests, self._config.timeout + requests["length"].sum() * 1e-9)

        return Verifier(self._config, pool, move, spans, self._batches)

    def target_cpu(self) -> float | None:
        """CPU seconds that the targets used so far, all together; None where one does not publish them."""
        time.sleep(2 * CPU_INTERVAL)  # until they have written it
        answer = np.zeros(1, np.int64)
        self._engine.register(answer, remote_accessible=False)
        try:
            nanoseconds = 0
            for segment in self._segments:
                buffer = next((b for b in segment.buffers if b.name == CPU_BUFFER), None)
                if buffer is None:
                    return None
                self._engine.read(answer, segment, buffer.address, self._config.timeout)
                nanoseconds += int(answer[0])
        finally:
            self._engine.unregister(answer)
        return nanoseconds / 1e9
