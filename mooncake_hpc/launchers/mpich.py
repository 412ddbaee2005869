"""MPICH and its kin: Hydra's mpiexec. It wants nothing for root nor for more ranks than cores."""

from __future__ import annotations

from mooncake_hpc.launchers.base import Job, Launcher


def command(job: Job, mpirun: str) -> list[str]:
    """Hydra hands its own environment to all ranks. A rank without a host file stays here, also inside Slurm."""
    words = [mpirun, "-n", str(job.ranks)]
    if job.hosts:
        words += ["-launcher", "ssh", "-hosts", job.placement]
        if job.remote_shell:
            words += ["-launcher-exec", job.remote_shell]
    for name, value in job.environment.items():
        words += ["-genv", name, value]
    if job.binds_itself:
        words += ["-bind-to", "none"]
    return [*words, *job.program]


MPICH = Launcher("mpich", ("mpich", "hydra", "mvapich"), "pmi2", {}, command)
