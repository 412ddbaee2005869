"""MPICH and its kin: Hydra's mpiexec. It wants nothing for root nor for more ranks than cores."""

from __future__ import annotations

import re

from mooncake_hpc.jobs.launchers.base import Job, Launcher

# Without a name of a file for it Hydra writes what it knows of a host's cores to one in /tmp, and leaves that behind
# where ranks abort. Of no file at all MPI looks at the cores itself. Proxies on other hosts hear of it only where the
# remote shell hands its variables on.
SETTINGS = {"HWLOC_XMLFILE": ""}

# Hydra tells the host and the process of a rank that was killed, not the rank: its shell does, and ends alike. Of
# signals that a program does not turn into an exit status of its own (ILL, ABRT, BUS, FPE, KILL, SEGV), and of exit
# statuses other than those before which a program, or the shell, has said why.
NAMING = (
    '"$@"; code=$?; name="rank $PMI_RANK on $(uname -n)"; case $code in 0|1|2|126|127|130|143) ;;'
    ' 132|134|135|136|137|139) echo "$name: ended by signal $((code - 128))" >&2; kill -$((code - 128)) $$ ;;'
    ' *) echo "$name: ended with exit code $code" >&2 ;;'
    " esac; exit $code"
)


def command(job: Job, mpirun: str) -> list[str]:
    """Hydra hands its own environment to all ranks, by its connections. Without a host file they stay on this host."""
    words = [mpirun, "-n", str(job.ranks)]
    if job.hosts:
        words += ["-launcher", "ssh", "-hosts", job.placement]
        if job.remote_shell:
            words += ["-launcher-exec", job.remote_shell]
    if job.binds_itself:
        words += ["-bind-to", "none"]
    return [*words, "sh", "-c", NAMING, "rank", *job.program]


def slurm_settings(version: str) -> dict[str, str]:
    """Over UCX, MPICH 5 exchanges addresses in lines of up to a kilobyte, which Slurm's pmi2 plugin sometimes tears
    apart ("value not properly terminated"), so that MPI_Init fails. Those of libfabric's tcp are short.
    """
    devices = re.search(r"Device:\s*ch4:(.*)", version)
    if devices is None or not {"ucx", "ofi"} <= set(re.split(r"[ ,]+", devices[1].strip())):
        return {}
    return {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}


MPICH = Launcher("mpich", ("mpich", "hydra", "mvapich"), "pmi2", SETTINGS, command, slurm_settings)
