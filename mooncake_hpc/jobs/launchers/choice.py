"""Which launcher fits: the mpirun beside this Python, and inside a Slurm allocation srun with the right --mpi."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.jobs.launchers import srun
from mooncake_hpc.jobs.launchers.base import Job, Launcher
from mooncake_hpc.jobs.launchers.intel import INTEL
from mooncake_hpc.jobs.launchers.mpich import MPICH
from mooncake_hpc.jobs.launchers.openmpi import OPENMPI

LAUNCHERS = {launcher.name: launcher for launcher in (INTEL, MPICH, OPENMPI)}  # Intel's also says "hydra"
VERSION_TIMEOUT = 60.0  # seconds for a program to tell its version; a loaded file system may be slow
ASK_LIBRARY = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"


def identify(text: str, what: str) -> Launcher:
    """Whose version text it is. ConfigError shows the text of `what` where it is nobody's."""
    lower = text.lower()
    for launcher in LAUNCHERS.values():
        if any(mark in lower for mark in launcher.marks):
            return launcher
    known = ", ".join(LAUNCHERS)
    raise ConfigError(f"{what} is of none of the MPI libraries known here ({known}); it says: {text.strip()[:300]!r}")


def find_mpirun() -> str:
    """The mpirun of this Python's environment, else the one in PATH. ConfigError when there is none."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found:
        raise ConfigError("no mpirun beside this Python nor in PATH: pip install mpich, or load the site's MPI module")
    return found


def launcher_of(mpirun: str) -> Launcher:
    """Which MPI library an mpirun belongs to."""
    return identify(_output([mpirun, "--version"]), mpirun)


def launcher_of_library() -> Launcher:
    """The MPI library that mpi4py loads in this Python, with its settings for srun; it is asked in another process and
    not initialised."""
    text = _output([sys.executable, "-c", ASK_LIBRARY])
    launcher = identify(text, "mpi4py's library")
    return replace(launcher, settings={**launcher.settings, **launcher.slurm_settings(text)})


def _output(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=VERSION_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cannot run {command[0]}: {error}") from error
    if result.returncode:
        raise ConfigError(f"{' '.join(command)} failed: {(result.stderr or result.stdout).strip()[-500:]}")
    return result.stdout + result.stderr


def command_line(job: Job, mpirun: str, in_slurm: bool, options: tuple[str, ...] = ()) -> tuple[list[str], Launcher]:
    """The whole command: srun where Slurm can start this library's ranks, else its mpirun.

    `options` are further words for srun.
    """
    if in_slurm and not job.hosts:
        launcher = launcher_of_library()
        available = srun.plugins(_output(["srun", "--mpi=list"]))
        if launcher.slurm in available:
            return srun.command(job, launcher.slurm, options, os.environ), launcher
        if options:
            raise ConfigError(f"this Slurm has no --mpi={launcher.slurm} for {launcher.name}, only {sorted(available)}")
    mpirun = mpirun or find_mpirun()
    launcher = launcher_of(mpirun)
    return launcher.command(job, mpirun), launcher


def environment(launcher: Launcher, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """`env` (ours by default) with the library's settings, which never replace the user's, and what Slurm needs."""
    return {**launcher.settings, **srun.environment(os.environ if env is None else env)}
