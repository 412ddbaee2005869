"""Open MPI, versions 4 and 5 (whose mpirun is PRRTE's)."""

from __future__ import annotations

from mooncake_hpc.jobs.launchers.base import Job, Launcher

# MPI only coordinates here, so that TCP and shared memory will do. Its ofi component sleeps for a second in MPI_Init,
# and its one-sided component over UCX complains where there is no fabric.
SETTINGS = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "^ofi,uct", "OMPI_MCA_osc": "^ucx"}


def command(job: Job, mpirun: str) -> list[str]:
    """Root, and here more ranks than cores, must be allowed by name; variables for other hosts are named one by one.

    Its own binding gives a small job's ranks one core each, too few for an engine's threads. With a host file
    --oversubscribe would put all ranks on the first host.
    """
    words = [mpirun, "-n", str(job.ranks), "--bind-to", "none"]
    if job.as_root:
        words.append("--allow-run-as-root")
    words += ["--host", job.placement] if job.hosts else ["--oversubscribe"]
    if job.remote_shell:  # each version ignores the other's name
        words += ["--mca", "plm_rsh_agent", job.remote_shell, "--mca", "plm_ssh_agent", job.remote_shell]
    for name in job.variables:
        words += ["-x", name]
    return [*words, *job.program]


OPENMPI = Launcher("openmpi", ("open mpi", "open rte", "openrte", "prrte"), "pmix", SETTINGS, command)
