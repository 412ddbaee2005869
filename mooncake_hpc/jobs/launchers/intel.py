"""Intel MPI: a Hydra of its own, with options of its own."""

from __future__ import annotations

from mooncake_hpc.jobs.launchers.base import Job, Launcher

SETTINGS = {"I_MPI_FABRICS": "shm:ofi", "I_MPI_SPIN_COUNT": "1"}  # MPI only waits here: it need not spin


def command(job: Job, mpirun: str) -> list[str]:
    """A list of machines takes its slots from a colon, as MPICH's, and ranks get Hydra's own environment, as there;
    pinning is switched off by a variable."""
    words = [mpirun, "-n", str(job.ranks)]
    if job.hosts:
        words += ["-bootstrap", "ssh", "-hosts", job.placement]
        if job.remote_shell:
            words += ["-bootstrap-exec", job.remote_shell]
    if job.binds_itself:
        words += ["-genv", "I_MPI_PIN", "off"]
    return [*words, *job.program]


INTEL = Launcher("intel", ("intel(r) mpi", "intel mpi"), "pmi2", SETTINGS, command)
