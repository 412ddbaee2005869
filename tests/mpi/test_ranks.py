"""The bench as ranks of an MPI job: patterns, one report, every byte compared. Run under mpirun by launch/test."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mooncake_hpc.bench import job
from mooncake_hpc.bench.plan import PATTERNS, BenchConfig, roles
from mooncake_hpc.bench.report import Units
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.jobs.mpi import World, detect

pytestmark = pytest.mark.mpi(min_size=2)
PROTOCOL = os.environ.get("MOONCAKE_HPC_TEST_PROTOCOL", "tcp")


def bench(tmp_path: Path, **changes: Any) -> tuple[int, list[str], dict[str, Any], World]:
    """Run the job; exit code, lines, JSON (rank 0's), world."""
    launch = detect()
    assert launch is not None, "run me under mpirun"
    world = World(launch)
    lines: list[str] = []
    small = {"block_size": 4096, "batch_size": 8, "threads": 2, "buffer_size": 1 << 20, "duration": 0.4}
    where = {"metadata_server": "embedded", "protocol": PROTOCOL, "timeout": 20.0}
    config = BenchConfig(**{**small, **where, "verify": True, **changes})
    file = tmp_path / "result.json"
    code = job.run_ranks(config, Settings.from_env(), launch, world, job.Output(lines.append, Units(), str(file)))
    result = json.loads(file.read_text()) if world.rank == 0 else {}
    return code, lines, result, world


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize(
    "pattern", [PATTERNS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in PATTERNS[1:])]
)
def test_patterns(tmp_path: Path, pattern: str, operation: str) -> None:
    code, lines, result, world = bench(tmp_path, pattern=pattern, operation=operation)
    assert code == 0
    if world.rank:
        assert lines == []
        return
    expected = [rank for rank, role in enumerate(roles(pattern, world.size)) if role.targets]
    assert [row["rank"] for row in result["initiators"]] == expected
    assert result["wrong_bytes"] == 0 < result["compared_bytes"] and result["transports"] == [PROTOCOL]
    assert result["batches"] == sum(row["batches"] for row in result["initiators"])
    assert result["batch_latency_us"]["count"] == result["batches"]
    assert result["batch_latency_us"]["max"] == max(row["batch_latency_us"]["max"] for row in result["initiators"])
    assert 0 < result["request_latency_us"]["p50"] <= result["batch_latency_us"]["max"]
    assert result["request_latency_us"]["count"] == sum(r["request_latency_us"]["count"] for r in result["initiators"])
    assert lines[-1].startswith("Test completed: duration ")
    assert sum(line.startswith("sum ") for line in lines) == (len(expected) > 1)


def test_shared_memory_carries_between_ranks(tmp_path: Path) -> None:
    code, lines, result, world = bench(tmp_path, protocol="shm")
    assert code == 0
    assert world.rank or (result["transports"] == ["shm"] and any("carried by shm" in line for line in lines))


def test_targets_cpu_is_counted(tmp_path: Path) -> None:
    code, _, result, world = bench(tmp_path, verify=False)
    assert code == 0
    assert world.rank or result["target_cpu_seconds"] > 0
