"""Slurm's srun: inside an allocation, and inside of a step that holds the allocation's cores already."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.jobs.launchers.base import Job

# Greater numbers are no srun's: those of a batch script, of salloc's shell on a node, of processes by ssh.
LAST_STEP = 0xFFFFFFF0 - 1
IMMEDIATE = 60  # seconds for Slurm to place a step inside of a step, before srun gives up and says so
# What one srun tells its tasks, and another would take for its own options: the cores of the first task, say.
OF_A_STEP = ("SLURM_CPU_BIND", "SLURM_MEM_BIND", "SLURM_DISTRIBUTION", "SLURM_HINT", "SLURM_CPUS_PER_TASK")


def in_allocation(env: Mapping[str, str]) -> bool:
    """Whether srun can start ranks here. Slurm's variables alone do not say so: containers inherit them."""
    return bool(env.get("SLURM_JOB_ID")) and shutil.which("srun", path=env.get("PATH")) is not None


def in_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process, as it does the shell of `srun --pty bash`: the step's cores are taken.

    Neither a batch script nor the shell of salloc holds any.
    """
    return bool(env.get("SLURM_JOB_ID")) and 0 <= _number(env, "SLURM_STEP_ID", -1) <= LAST_STEP


def check_once(env: Mapping[str, str]) -> None:
    """Raise ConfigError where srun started this command several times, so that each would start all ranks."""
    if in_step(env) and _number(env, "SLURM_PROCID", 0) > 0:
        raise ConfigError(
            f"this is task {env['SLURM_PROCID']} of a Slurm step, and every task would start ranks of its own: run it "
            "once, in a batch script without srun, or in the shell of salloc or of srun --pty"
        )


def tasks(env: Mapping[str, str]) -> int:
    """The tasks of the job, or of the step: SLURM_NTASKS, which is not set where only nodes were asked for."""
    nodes = _number(env, "SLURM_NNODES", 1)
    return _number(env, "SLURM_NTASKS", nodes * _number(env, "SLURM_NTASKS_PER_NODE", 1))


def command(job: Job, mpi: str, options: tuple[str, ...] = (), env: Mapping[str, str] | None = None) -> list[str]:
    """A job step; `mpi` is what --mpi gets. One failed rank ends the step at once, its output lines are labelled.

    `env` is the environment inside the allocation. Slurm 22.05 and later give a step's task one core, whatever the
    job's --cpus-per-task was, unless srun is told. A step inside of another must overlap it: else it waits for ever.
    """
    env = env or {}
    if job.hosts:
        raise ConfigError("a host file has no meaning inside a Slurm allocation: Slurm chooses the hosts")
    words = ["srun", f"--ntasks={job.ranks}", f"--mpi={mpi}", "--kill-on-bad-exit=1", "--export=ALL"]
    if in_step(env):
        words += ["--overlap", f"--immediate={IMMEDIATE}"]
    cores = _number(env, "SLURM_CPUS_PER_TASK", 0)
    if cores and job.ranks == tasks(env) and "SRUN_CPUS_PER_TASK" not in env:
        words.append(f"--cpus-per-task={cores}")
    if 0 < per_node_sum(env.get("SLURM_JOB_CPUS_PER_NODE", "")) < job.ranks:
        words.append("--overcommit")
    if job.binds_itself:
        words.append("--cpu-bind=none")
    return [*words, *options, *job.program]


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env` for srun, or for an mpirun that calls it. Outside of an allocation Slurm's variables are left over from
    another machine, and would send an mpirun there."""
    if not in_allocation(env):
        return {name: value for name, value in env.items() if not name.startswith("SLURM_")}
    kept = {**env, "SLURM_EXPORT_ENV": "ALL"}
    if in_step(env):
        kept = {name: value for name, value in kept.items() if not name.startswith(OF_A_STEP)}
        kept["SLURM_OVERLAP"] = "1"
    return kept


def plugins(listing: str) -> set[str]:
    """The values that `srun --mpi=list` printed; some versions say more on the same line."""
    return {word.strip(":,") for line in listing.splitlines() for word in line.split()} - {"MPI", "plugin", "types"}


def per_node_sum(text: str) -> int:
    """The sum of a list as Slurm writes it: `2(x3),1` is 7; 0 where it is none."""
    total = 0
    for part in text.split(","):
        count, _, times = part.partition("(x")
        factor = times.rstrip(")") or "1"
        if not (count.isdecimal() and factor.isdecimal()):
            return 0
        total += int(count) * int(factor)
    return total


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    return int(text) if text.isdecimal() else default
