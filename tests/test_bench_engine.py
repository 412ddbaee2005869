"""Target and initiator over real engines; faults are put into the batches that the engine is given."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mooncake_hpc import TransferEngine
from mooncake_hpc.bench import runner
from mooncake_hpc.bench.node import CPU_BUFFER, Initiator, Result, Target
from mooncake_hpc.bench.plan import BenchConfig
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.workers.pool import WorkerPool

Requests = npt.NDArray[Any]
BLOCK, BATCH, THREADS = 8192, 16, 2


class FaultyEngine:
    """An engine that alters a batch on its way in."""

    def __init__(self, engine: TransferEngine, alter: Callable[[Requests], Requests]) -> None:
        self._engine, self._alter, self.armed = engine, alter, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def transfer(self, requests: Requests, timeout: float | None = None) -> None:
        self._engine.transfer(self._altered(requests), timeout)

    def repeat(self, requests: Requests, *arguments: Any) -> int:
        return self._engine.repeat(self._altered(requests), *arguments)

    def _altered(self, requests: Requests) -> Requests:
        timed = self.armed and requests.size == BATCH  # and not the verifier's own
        return self._alter(requests) if timed else requests


@pytest.fixture
def engines() -> Iterator[tuple[TransferEngine, TransferEngine]]:
    place = f"memory://{uuid.uuid4()}"
    with (
        TransferEngine("127.0.0.1:22001", place, protocol="tcp") as one,
        TransferEngine("127.0.0.1:22002", place, protocol="tcp") as two,
    ):
        yield one, two


def config(operation: str, **changes: Any) -> BenchConfig:
    small = {"block_size": BLOCK, "batch_size": BATCH, "threads": THREADS, "buffer_size": BLOCK * BATCH * THREADS}
    rounds = {"duration": 0.1, "verify_interval": 2, "verify": True}
    return BenchConfig(**{**small, **rounds, "operation": operation, **changes})


def run(
    engines: tuple[TransferEngine, TransferEngine], run_config: BenchConfig, alter: Any = None, workers: int = 0
) -> Result:
    target, initiator = engines
    Target(target, run_config)
    engine = FaultyEngine(initiator, alter or (lambda requests: requests))
    node = Initiator(engine, run_config, [target.name], [0])  # type: ignore[arg-type]
    with WorkerPool(workers) as pool:
        node.warm_up(pool)
        engine.armed = True
        return node.run(pool)


def clip(requests: Requests) -> Requests:
    changed = requests.copy()
    changed["length"][5] -= 1
    return changed


def drop(requests: Requests) -> Requests:
    changed = requests.copy()
    changed["length"][5] = 0
    return changed


def swap(requests: Requests) -> Requests:
    changed = requests.copy()
    changed["remote_addr"][[3, 7]] = requests["remote_addr"][[7, 3]]
    return changed


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sound_run(engines: tuple[TransferEngine, TransferEngine], operation: str, workers: int) -> None:
    run_config = config(operation)
    result = run(engines, run_config, workers=workers)
    measured = result.measured
    assert measured.failure == "" and measured.wrong == 0 < measured.compared and measured.batches > 0
    assert result.transports == ["tcp"] and sum(result.lane_bytes.values()) >= measured.batches * run_config.batch_bytes


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize(
    ("alter", "least", "most"),
    [(clip, 0, 2), (drop, 0.97 * 2 * BLOCK, 2 * BLOCK), (swap, 0.97 * 4 * BLOCK, 4 * BLOCK)],
)
def test_injected_faults_are_counted(
    engines: tuple[TransferEngine, TransferEngine], operation: str, alter: Any, least: float, most: float
) -> None:
    """In every round both submitters' batches are spoilt alike; 1 byte in 256 is right by chance."""
    result = run(engines, config(operation), alter)
    rounds = result.measured.compared // (BLOCK * BATCH * THREADS)
    assert least * rounds <= result.measured.wrong <= most * rounds
    assert result.measured.wrong > 0 and result.measured.failure == ""


def test_progress_of_a_verified_run_is_told(
    engines: tuple[TransferEngine, TransferEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PROGRESS", 0.0)
    run_config = config("read")
    Target(engines[0], run_config)
    node, told = Initiator(engines[1], run_config, [engines[0].name], [0]), list[str]()
    with WorkerPool(0) as pool:
        node.warm_up(pool)
        result = node.run(pool, told.append)
    assert told[-1].endswith(f"{result.measured.compared} bytes compared, 0 wrong") and len(told) > 1, told


def test_the_targets_cpu_time_is_read(engines: tuple[TransferEngine, TransferEngine]) -> None:
    run_config = config("read")
    target = Target(engines[0], run_config)
    target.tick()
    node = Initiator(engines[1], run_config, [engines[0].name], [0])
    assert (node.target_cpu() or 0) > 0.1


def test_a_target_publishes_two_buffers_and_is_measured_before_the_run(
    engines: tuple[TransferEngine, TransferEngine],
) -> None:
    Target(engines[0], config("read"))
    segment = engines[1].open_segment(engines[0].name)
    assert len([b for b in segment.buffers if b.name != CPU_BUFFER]) >= 2
    with pytest.raises(ConfigError, match=r"buffer 0 has 262144 bytes.*--buffer_size=524288"):
        Initiator(engines[1], config("read", threads=4), [engines[0].name], [0])


def test_a_segment_without_buffers_is_no_target(engines: tuple[TransferEngine, TransferEngine]) -> None:
    with pytest.raises(ConfigError, match="has no buffers"):
        Initiator(engines[1], config("read"), [engines[0].name], [0])


def test_latencies_and_time_are_of_the_window(engines: tuple[TransferEngine, TransferEngine]) -> None:
    result = run(engines, config("read", verify=False, duration=0.3))
    measured = result.measured
    assert 0.3 <= measured.seconds < 1 and measured.latency.total == measured.batches
    busy = measured.latency.sum / 1e9
    assert busy <= measured.seconds * THREADS * 1.01
    assert np.isclose(busy, measured.seconds * THREADS, rtol=0.5)


@pytest.mark.parametrize("batch_size", [1, BATCH])
def test_requests_are_timed_one_by_one(engines: tuple[TransferEngine, TransferEngine], batch_size: int) -> None:
    measured = run(engines, config("write", verify=False, batch_size=batch_size)).measured
    requests, batches = measured.request_latency, measured.latency
    assert requests.total % batch_size == 0 and THREADS <= requests.total // batch_size <= batches.total
    assert 0 < requests.least <= requests.greatest <= batches.greatest
