"""What is to be started, and what a launcher must know to start it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mooncake_hpc.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Host:
    """A machine, and how many ranks it is meant to take."""

    name: str
    slots: int = 1


@dataclass(frozen=True, slots=True)
class Job:
    """Ranks to start. No `hosts`: on this machine, or as the batch system says."""

    ranks: int
    program: Sequence[str]
    hosts: tuple[Host, ...] = ()
    variables: tuple[str, ...] = ()  # names of what ranks on other hosts get; values stay off the command line
    remote_shell: str = ""  # an executable that takes HOST COMMAND…, in place of ssh
    as_root: bool = False
    binds_itself: bool = False  # the program chooses its cores, so that the launcher must not

    def __post_init__(self) -> None:
        slots = sum(host.slots for host in self.hosts)
        if self.ranks < 1:
            raise ConfigError(f"a job of {self.ranks} ranks: at least 1")
        if self.hosts and self.ranks > slots:
            raise ConfigError(
                f"{self.ranks} ranks, but the {len(self.hosts)} hosts have {slots} slots: give more hosts, "
                "or more slots a host (h0:4, or h0 slots=4)"
            )

    @property
    def placement(self) -> str:
        """`h0:2,h1:1`: the hosts that get ranks, filled one after the other."""
        words, left = [], self.ranks
        for host in self.hosts:
            if left:
                words.append(f"{host.name}:{min(left, host.slots)}")
                left -= min(left, host.slots)
        return ",".join(words)


@dataclass(frozen=True, slots=True)
class Launcher:
    """An MPI library's way to start ranks.

    `marks` are words (lower case) by which its library or its mpirun gives itself away; `settings` go into the
    environment where the user has not set them; `slurm` is the `--mpi=` with which srun starts its ranks, and
    `slurm_settings` are further settings for that, of the library's version text.
    """

    name: str
    marks: tuple[str, ...]
    slurm: str
    settings: Mapping[str, str]
    command: Callable[[Job, str], list[str]]  # of a job and the path of its mpirun
    slurm_settings: Callable[[str], Mapping[str, str]] = lambda text: {}
