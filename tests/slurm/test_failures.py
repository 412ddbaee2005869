"""Jobs that go wrong: they end by their deadline, say who failed where and why, print no sum, and leave nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sandbox import LOCKED, NODES, QUICK, Job, Sandbox, SiteEtcd, wait_until

TIMEOUT, SETTLE = 5, 8  # seconds: --timeout and MOONCAKE_HPC_SETTLE of these jobs
PATIENT = TIMEOUT + SETTLE  # a rank is waited for so long, on top of what it is to do
SHUTDOWN = 15  # seconds that Slurm, mpi and a loaded machine may take on top
WAYS = ("raises", "exits", "leaves", "hangs")
ENV = {"MOONCAKE_HPC_SETTLE": str(SETTLE), "MC_TCP_PROGRESS_TIMEOUT_SEC": str(TIMEOUT)}


pytestmark = pytest.mark.usefixtures("clean")


def start(slurm: Sandbox, folder: Path, *flags: str, script: str = "all-to-all.sbatch", **env: str) -> str:
    """A job on three nodes, in its timed window."""
    words = [*QUICK, "--duration=30", f"--timeout={TIMEOUT}", *flags]
    number = slurm.submit(script, *words, folder=folder, options=["--nodes=3"], env={**ENV, **env})
    slurm.wait_for(number, "connected and warm")
    return number


def check_nothing_came_of(job: Job) -> None:
    """No sum, no closing line, no result."""
    assert job.state not in ("COMPLETED", "RUNNING"), job
    assert "Test completed" not in job.output and "sum " not in job.output and job.results == [], job


@pytest.mark.parametrize("how", WAYS)
def test_a_rank_that_is_unwell(slurm: Sandbox, tmp_path: Path, how: str) -> None:
    unwell = str(Path(__file__).parent / "unwell")
    duration = 2 if how == "hangs" else 20  # the others notice one that left while they run
    number = start(slurm, tmp_path, f"--duration={duration}", PYTHONPATH=unwell, UNWELL=f"1 {how}")
    (job,) = slurm.wait(number, (duration + TIMEOUT + PATIENT if how == "hangs" else 1) + SHUTDOWN)
    check_nothing_came_of(job)
    message = {
        "raises": "rank 1 on h1: RuntimeError: this rank is unwell",
        "exits": "h1: task 1: Exited with exit code 3",
        "leaves": "(segment 'h1:12346' is gone",
        "hangs": "rank 1 on h1 did not come within",
    }[how]
    assert message in job.output, job


def test_a_rank_that_does_not_start(slurm: Sandbox, tmp_path: Path) -> None:
    unwell = str(Path(__file__).parent / "unwell")
    env = {**ENV, "PYTHONPATH": unwell, "UNWELL": "2 does-not-start"}
    number = slurm.submit("all-to-all.sbatch", *QUICK, folder=tmp_path, options=["--nodes=3"], env=env)
    slurm.wait_for(number, "metadata at")
    (job,) = slurm.wait(number, SETTLE + SHUTDOWN)
    check_nothing_came_of(job)
    assert f"rank 0 on h0: MPI_Init has waited {SETTLE} s for the other ranks" in job.output, job


def test_a_node_that_dies(slurm: Sandbox, tmp_path: Path) -> None:
    """Its peers see silence, no reset; the first whose transfer fails ends the ranks. Slurm waits longer."""
    number = start(slurm, tmp_path)
    slurm("crash", "h2")
    try:
        wait_until(lambda: not list(slurm.processes()), 2 * TIMEOUT + SHUTDOWN, lambda: f"left: {slurm.left()}")
        assert slurm.jobs(number)[0].state != "RUNNING"
    finally:
        slurm("boot", "h2")
    (job,) = slurm.wait(number, 60)
    check_nothing_came_of(job)
    assert any(f"rank {rank} on h{rank}: " in job.output for rank in (0, 1)) and "h2:12347" in job.output, job
    wait_until(lambda: idle(slurm) == NODES, 60, lambda: slurm("run", "sinfo", "-R"))


def idle(slurm: Sandbox) -> int:
    return int(slurm("run", "sinfo", "-h", "-t", "idle", "-o", "%D") or "0")


def test_a_time_limit(slurm: Sandbox, tmp_path: Path) -> None:
    number = start(slurm, tmp_path)
    slurm("run", "scontrol", "update", f"jobid={number}", "EndTime=now")
    (job,) = slurm.wait(number, 30 + SHUTDOWN)
    check_nothing_came_of(job)
    assert "stopped by a signal" in job.output, job


def test_scancel(slurm: Sandbox, tmp_path: Path, site_etcd: SiteEtcd) -> None:
    """Ranks may lock as much memory as can be, though the submitting shell could not. Their keys go with them."""
    number = start(slurm, tmp_path, ETCD_ENDPOINTS=site_etcd.endpoint)
    keys = site_etcd.keys()
    assert len(keys) >= 3 and all(key.startswith(f"mooncake/slurm-{number}/") for key in keys), keys
    ranks = [
        (host, pid) for host, pid, line in slurm.processes() if "-m mooncake_hpc bench" in line and "srun" not in line
    ]
    assert sorted({host for host, _ in ranks}) == ["h0", "h1", "h2"], ranks
    for _, pid in ranks:
        soft, hard = re.findall(r"Max locked memory +(\w+) +(\w+)", Path(f"/proc/{pid}/limits").read_text())[0]
        assert soft == hard != str(LOCKED)
    slurm("run", "scancel", number)
    (job,) = slurm.wait(number, SHUTDOWN)
    check_nothing_came_of(job)
    assert job.state == "CANCELLED", job
