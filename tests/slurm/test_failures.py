"""Jobs that go wrong: they end by their deadline, say who failed where and why, print no sum, and leave nothing."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from sandbox import LOCKED, NODES, QUICK, Job, Sandbox, SiteEtcd, wait_until

TIMEOUT, SETTLE = 5, 20  # seconds: --timeout and MOONCAKE_HPC_SETTLE of these jobs
PATIENT = TIMEOUT + SETTLE  # a rank is waited for so long, on top of what it is to do
SHUTDOWN = 15  # seconds that Slurm, mpi and a loaded machine may take on top
NO_SRUN = 30  # seconds that ranks take to end, on top, where their srun is gone
UNWELL = str(Path(__file__).parent / "unwell")  # a PYTHONPATH that makes a rank fail, as the variable UNWELL says
ENV = {"MOONCAKE_HPC_SETTLE": str(SETTLE), "MC_TCP_PROGRESS_TIMEOUT_SEC": str(TIMEOUT)}


pytestmark = pytest.mark.usefixtures("clean")


def start(slurm: Sandbox, folder: Path, *flags: str, nodes: int = 3, **env: str) -> str:
    """A job in its timed window."""
    words = [*QUICK, "--duration=30", f"--timeout={TIMEOUT}", *flags]
    options = [f"--nodes={nodes}"]
    number = slurm.submit("all-to-all.sbatch", *words, folder=folder, options=options, env={**ENV, **env})
    slurm.wait_for(number, "connected and warm")
    return number


def ranks(slurm: Sandbox) -> list[tuple[str, int]]:
    """Host and process of each rank of the bench."""
    running = slurm.processes()
    return [(host, pid) for host, pid, line in running if "-m mooncake_hpc bench" in line and "srun" not in line]


def check_nothing_came_of(job: Job) -> None:
    """No sum, no closing line, no result; and of ranks that met with the same one has told it."""
    assert len(re.findall(r"^rank \d+ on ", job.output, re.MULTILINE)) <= 1, job
    assert job.state not in ("COMPLETED", "RUNNING"), job
    assert "Test completed" not in job.output and "sum " not in job.output and job.results == [], job


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "rank 1 on h1: RuntimeError: this rank is unwell"),
        ("exits", "h1: task 1: Exited with exit code 3"),
        ("leaves", "; no answer from rank 1 on h1\n"),
    ],
    ids=["raises", "exits", "leaves"],
)
def test_a_rank_that_is_unwell(slurm: Sandbox, tmp_path: Path, how: str, message: str) -> None:
    """The job ends at once, in the middle of what the other ranks do."""
    number = start(slurm, tmp_path, PYTHONPATH=UNWELL, UNWELL=f"1 {how}")
    (job,) = slurm.wait(number, 1 + SHUTDOWN)
    check_nothing_came_of(job)
    assert message in job.output, job


def submit_unwell(slurm: Sandbox, folder: Path, how: str, nodes: int) -> str:
    """A job whose last rank never gets to its timed window."""
    env = {**ENV, "PYTHONPATH": UNWELL, "UNWELL": f"{nodes - 1} {how}"}
    flags = [*QUICK, f"--timeout={TIMEOUT}"]
    number = slurm.submit("all-to-all.sbatch", *flags, folder=folder, options=[f"--nodes={nodes}"], env=env)
    slurm.wait_for(number, "metadata at")
    return number


def test_ranks_that_hang_before_they_are_ready(slurm: Sandbox, tmp_path: Path) -> None:
    """Two jobs at once, as both are waited for: before MPI_Init, where rank 0 cannot know who is missing, and after."""
    first = submit_unwell(slurm, tmp_path / "first", "does-not-start", nodes=2)
    later = submit_unwell(slurm, tmp_path / "later", "hangs-in-set-up", nodes=2)
    (job,) = slurm.wait(first, SETTLE + SHUTDOWN)
    check_nothing_came_of(job)
    assert f"rank 0 on h0: MPI_Init has waited {SETTLE} s for the other ranks" in job.output, job
    (job,) = slurm.wait(later, PATIENT + SHUTDOWN)
    check_nothing_came_of(job)
    late = f"rank 1 on h3 did not come within {PATIENT} s to: targets publish their buffers"
    assert job.output.count("rank 0 on h2: TimeoutError: ") == job.output.count(late) == 1, job


def test_a_rank_that_the_others_cannot_reach(slurm: Sandbox, tmp_path: Path) -> None:
    (job,) = slurm.wait(submit_unwell(slurm, tmp_path, "cannot-be-reached", nodes=3), TIMEOUT + SHUTDOWN)
    check_nothing_came_of(job)
    assert re.search(
        r"rank 0 on h0: PeerLost: .*data port 127\.0\.0\.2:\d+: .*; no answer from rank 2 on h2$", job.output, re.M
    ), job


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


def test_the_first_node_dies(slurm: Sandbox, tmp_path: Path) -> None:
    """With it go the batch script, srun and etcd, so that nobody is left to tell. The other ranks end all the same;
    then slurmstepd, once it has given up telling srun, and the job, after SlurmdTimeout."""
    number = start(slurm, tmp_path, TMPDIR="/dev/shm")  # a crash empties it
    assert {host for host, _ in ranks(slurm)} == {"h0", "h1", "h2"}
    slurm("crash", "h0")
    try:
        wait_until(lambda: not ranks(slurm), 2 * TIMEOUT + NO_SRUN, lambda: f"left: {slurm.left()}")
        wait_until(lambda: not slurm.left(), 60, lambda: f"left: {slurm.left()}")
        (job,) = slurm.wait(number, 60)
    finally:
        slurm("boot", "h0")
    check_nothing_came_of(job)
    assert job.state == "NODE_FAIL", job
    wait_until(lambda: idle(slurm) == NODES, 60, lambda: slurm("run", "sinfo", "-R"))


def idle(slurm: Sandbox) -> int:
    return int(slurm("run", "sinfo", "-h", "-t", "idle", "-o", "%D") or "0")


def test_a_rank_that_hangs_and_a_time_limit(slurm: Sandbox, tmp_path: Path) -> None:
    """Two jobs at once, as both are mostly waited for."""
    limited = start(slurm, tmp_path / "limited", "--duration=120", nodes=2)
    slurm("run", "scontrol", "update", f"jobid={limited}", "EndTime=now+5seconds")
    end = time.monotonic() + 30 + SHUTDOWN
    hanging = start(slurm, tmp_path / "hanging", "--duration=2", nodes=2, PYTHONPATH=UNWELL, UNWELL="1 hangs")
    (job,) = slurm.wait(hanging, 2 + TIMEOUT + PATIENT + SHUTDOWN)
    check_nothing_came_of(job)
    assert "rank 1 on h3 did not come within" in job.output, job
    (job,) = slurm.wait(limited, end - time.monotonic())
    check_nothing_came_of(job)
    assert "stopped by a signal" in job.output, job


def test_a_trainer_that_fails(slurm: Sandbox, tmp_path: Path) -> None:
    """Inferencers, which would wait for its model for minutes, end with it, though they have no MPI world in common."""
    number = slurm.submit("heterogeneous.sbatch", "--protocol=tcp", "--file=/nowhere", folder=tmp_path)
    slurm.wait_for(number, "metadata at")
    job, other = slurm.wait(number, SHUTDOWN)
    assert (job.state, job.code, other.state, job.results) == ("FAILED", "1:0", "FAILED", []), job
    assert "/nowhere" in job.output and "a trainer ended before the inferencers did" in job.output, job


def test_an_inferencer_that_is_killed(slurm: Sandbox, tmp_path: Path) -> None:
    """No result of the others, who may have theirs already, passes for that of the job."""
    number = slurm.submit("heterogeneous.sbatch", "--protocol=tcp", "--size=4096", folder=tmp_path)
    slurm.wait_for(number, "verified")
    inferencers = [(host, pid) for host, pid, line in slurm.processes() if "--cmd=inferencer --name" in line]
    os.kill(next(pid for host, pid in inferencers if host != "h0"), signal.SIGKILL)
    job, other = slurm.wait(number, SHUTDOWN)
    assert (job.state, job.code, other.state, job.results) == ("FAILED", "1:0", "FAILED", []), job
    assert "Killed" in job.output and "an inferencer failed" in job.output, job
    assert not list(tmp_path.glob("*.json*"))


def test_the_batch_script_is_killed(slurm: Sandbox, tmp_path: Path) -> None:
    """As when the node's memory is used up: it can end nothing, and etcd is no child of Slurm's any more."""
    number = start(slurm, tmp_path, nodes=2)
    (script,) = [pid for _, pid, line in slurm.processes() if "/slurm_script " in line and "bash -c" not in line]
    os.kill(script, signal.SIGKILL)
    (job,) = slurm.wait(number, SHUTDOWN)
    check_nothing_came_of(job)


def test_scancel(slurm: Sandbox, tmp_path: Path, site_etcd: SiteEtcd) -> None:
    """Ranks may lock as much memory as can be, though the submitting shell could not. Their keys go with them."""
    number = start(slurm, tmp_path, ETCD_ENDPOINTS=site_etcd.endpoint)
    keys = site_etcd.keys()
    assert len(keys) >= 3 and all(key.startswith(f"mooncake/slurm-{number}/") for key in keys), keys
    running = ranks(slurm)
    assert {host for host, _ in running} == {"h0", "h1", "h2"}, running
    for _, pid in running:
        soft, hard = re.findall(r"Max locked memory +(\w+) +(\w+)", Path(f"/proc/{pid}/limits").read_text())[0]
        assert soft == hard != str(LOCKED)
    slurm("run", "scancel", number)
    (job,) = slurm.wait(number, SHUTDOWN)
    check_nothing_came_of(job)
    assert job.state == "CANCELLED", job
