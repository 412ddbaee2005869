"""Ties a rank to cores beside its NIC: `python binding.py DEVICE COMMAND…` becomes COMMAND on its share of them.

Every launcher binds in a way of its own, and none knows which NIC the engine will use; so launchers are told to
leave ranks alone, and this file, which imports nothing but the standard library, runs before the program.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

LOCAL = (  # which rank of this host, of how many: Open MPI, Hydra, MVAPICH, Slurm
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)
ANY = "any"  # the first RDMA device, else every core


def local_rank(env: Mapping[str, str]) -> tuple[int, int]:
    """Number of this rank on its host, and how many there are; (0, 1) where no launcher says."""
    for rank, size in LOCAL:
        if env.get(rank, "").isdigit():
            index = int(env[rank])
            sizes = [int(part.partition("(")[0]) for part in env.get(size, "1").split(",")]  # Slurm: 2(x3),1
            return index, max(index + 1, *sizes)
    return 0, 1


def parse_cpus(text: str) -> list[int]:
    """The kernel's lists: `0-3,8` is [0, 1, 2, 3, 8]."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def cpus_beside(device: str, root: Path = Path("/sys/class")) -> list[int]:
    """Cores of the NUMA node that the RDMA device or network interface is attached to; [] where that is unknown."""
    if device == ANY:
        found = sorted(root.glob("infiniband/*"))
        device = found[0].name if found else ""
    for kind in ("infiniband", "net"):
        file = root / kind / device / "device" / "local_cpulist"
        if device and file.exists():
            return parse_cpus(file.read_text())
    return []


def share(allowed: Iterable[int], beside: Iterable[int], index: int, size: int) -> list[int]:
    """Cores of rank `index` of `size`: its share of the allowed ones beside the NIC, disjoint from other ranks'.

    Where these are fewer than ranks all allowed ones are shared out, and where even these are too few nobody is
    bound: two ranks that poll on one core would starve one another.
    """
    near = sorted(set(allowed) & set(beside))
    cpus = near if len(near) >= size else sorted(set(allowed))
    if len(cpus) < size:
        return cpus
    return cpus[index * len(cpus) // size : (index + 1) * len(cpus) // size]


def main(arguments: list[str]) -> None:
    """Bind, then become the command; does not return."""
    device, *command = arguments
    index, size = local_rank(os.environ)
    os.sched_setaffinity(0, share(os.sched_getaffinity(0), cpus_beside(device), index, size))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
