"""Slurm's srun, inside an allocation."""

from __future__ import annotations

from mooncake_hpc.errors import ConfigError
from mooncake_hpc.launchers.base import Job


def command(job: Job, mpi: str, options: tuple[str, ...] = ()) -> list[str]:
    """A job step; `mpi` is what --mpi gets. One failed rank ends the step at once, its output lines are labelled."""
    if job.hosts:
        raise ConfigError("a host file has no meaning inside a Slurm allocation: Slurm chooses the hosts")
    words = ["srun", f"--ntasks={job.ranks}", f"--mpi={mpi}", "--kill-on-bad-exit=1", "--export=ALL"]
    if job.binds_itself:
        words.append("--cpu-bind=none")
    assignments = [f"{name}={value}" for name, value in job.environment.items()]
    return [*words, *options, *(["env", *assignments] if assignments else []), *job.program]


def plugins(listing: str) -> set[str]:
    """The values that `srun --mpi=list` printed; some versions say more on the same line."""
    return {word.strip(":,") for line in listing.splitlines() for word in line.split()} - {"MPI", "plugin", "types"}
