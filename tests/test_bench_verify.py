"""Verification catches what it must, over an engine that copies memory and can be told to fail in one way."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mooncake_hpc import WRITE
from mooncake_hpc.bench.plan import BenchConfig, Remote, build_requests
from mooncake_hpc.bench.runner import Runner
from mooncake_hpc.bench.verify import Verifier, spans_of
from mooncake_hpc.core.errors import PeerLost, TransferError
from mooncake_hpc.workers.pool import WorkerPool

BLOCK, BATCH, THREADS = 4096, 8, 2
Change = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


class CopyEngine:
    """Both sides are in this process; `change` alters batch number `at`, `after` may spoil its result."""

    def __init__(self) -> None:
        self.submitted = 0
        self.at = -1
        self.change: Change = lambda requests: requests
        self.after: Callable[[npt.NDArray[Any]], None] = lambda requests: None
        self.error: TransferError | None = None

    def transfer(self, requests: npt.NDArray[Any], timeout: float | None = None) -> None:
        self.submitted += 1
        hit = requests.size == BATCH and self.submitted >= self.at > 0
        if hit and self.error:
            raise self.error
        for opcode, _, local, remote, length in (self.change(requests) if hit else requests).tolist():
            ends = (remote, local) if opcode == WRITE else (local, remote)
            ctypes.memmove(*ends, length)
        if hit:
            self.after(requests)

    def repeat(
        self, requests: npt.NDArray[Any], latencies: npt.NDArray[Any], seconds: float, timeout: float | None = None,
        request_latencies: npt.NDArray[Any] | None = None,
    ) -> int:  # fmt: skip
        end = time.monotonic() + seconds
        for done in range(len(latencies)):
            if done and time.monotonic() > end:
                return done
            self.transfer(requests, timeout)
            latencies[done] = 1
        return len(latencies)


class Rig:
    def __init__(self, operation: str, **changes: Any) -> None:
        self.config = BenchConfig(
            operation=operation, block_size=BLOCK, batch_size=BATCH, threads=THREADS, buffer_size=1 << 20,
            duration=changes.pop("duration", 0.05), verify_interval=2, warmup=1, verify=True, **changes,
        )  # fmt: skip
        self.local = np.zeros(self.config.footprint, np.uint8)
        self.remote = np.zeros(self.config.footprint * 2, np.uint8)
        base, region = self.local.ctypes.data, self.config.footprint
        there = Remote(0, self.remote.ctypes.data + region)
        self.batches = [build_requests(self.config, t, base, [there]) for t in range(THREADS)]
        self.engine = CopyEngine()
        self.runner = Runner(self.engine, self.config, self.batches)
        self.verifier = Verifier(
            self.config,
            WorkerPool(0),
            lambda requests: self.engine.transfer(requests, 5),
            spans_of([(base, self.local)], self.batches, region),
            self.batches,
        )


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_faithful_engine_has_no_wrong_bytes(operation: str) -> None:
    rig = Rig(operation)
    rig.runner.warm_up()
    measured = rig.runner.run(rig.verifier)
    assert measured.wrong == 0 and measured.errors == 0 and rig.verifier.rounds > 1
    assert measured.compared == rig.verifier.rounds * rig.config.footprint
    assert measured.latency.total == measured.batches > 0
    assert 0 < measured.seconds < 2 and measured.cpu_seconds > 0
    assert not rig.remote[: rig.config.footprint].any()  # the other region was never touched


def drop_one(requests: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.delete(requests, 3)


def swap_two(requests: npt.NDArray[Any]) -> npt.NDArray[Any]:
    swapped = requests.copy()
    swapped["remote_addr"][[1, 6]] = requests["remote_addr"][[6, 1]]
    return swapped


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize(("change", "slices"), [(drop_one, 1), (swap_two, 2)])
def test_lost_and_swapped_slices_are_caught(operation: str, change: Change, slices: int) -> None:
    rig = Rig(operation)
    rig.engine.change = change
    rig.verifier.begin()
    rig.engine.at = 1
    rig.runner._window(1, 1.0)
    wrong = rig.verifier.check()
    share = wrong / (slices * BLOCK * THREADS)  # 1 in 256 bytes is right by chance
    assert 0.98 < share <= 1.0 and rig.verifier.wrong == wrong


@pytest.mark.parametrize("operation", ["read", "write"])
def test_one_flipped_bit_is_one_wrong_byte(operation: str) -> None:
    rig = Rig(operation)
    rig.verifier.begin()
    rig.runner._window(2, 1.0)
    where = rig.remote[rig.config.footprint :] if operation == "write" else rig.local
    where[12345] ^= 1
    assert rig.verifier.check() == 1


def test_a_batch_of_an_earlier_round_does_not_pass() -> None:
    rig = Rig("write")
    rig.verifier.begin()
    rig.runner._window(1, 1.0)
    assert rig.verifier.check() == 0
    rig.verifier.begin()  # and no transfer
    assert rig.verifier.check() > 0.98 * rig.config.footprint


def test_a_failure_ends_the_run_and_is_counted() -> None:
    rig = Rig("read", duration=30)
    rig.engine.at, rig.engine.error = 50, PeerLost("peer t:1 is gone")
    rig.engine.error.failed = BATCH
    measured = rig.runner.run()
    assert measured.failure == "PeerLost: peer t:1 is gone"
    assert measured.errors in (BATCH, 2 * BATCH) and 0 < measured.batches < 50
    assert measured.seconds < 10


def test_spans_skip_what_is_not_addressed_and_merge_the_rest() -> None:
    buffer = np.zeros(1 << 20, np.uint8)
    config = BenchConfig(block_size=100, batch_size=3, threads=2, buffer_size=1 << 20)
    one = [build_requests(config, 0, 5000, [Remote(0, 0)])]
    both = [*one, build_requests(config, 1, 5000, [Remote(0, 0)])]
    assert [(s.offset, s.array.size) for s in spans_of([(5000, buffer)], one, 10)] == [
        (10, 100), (210, 100), (410, 100),
    ]  # fmt: skip
    assert [(s.offset, s.array.size) for s in spans_of([(5000, buffer)], both, 10)] == [(10, 600)]
