"""`mooncake-hpc launch … -- COMMAND…`: ranks by mpirun or srun, with what this MPI library needs."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mooncake_hpc.cli.gflags import Flag, FlagSet, Parsed
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.jobs.launchers import binding, hostfile, srun
from mooncake_hpc.jobs.launchers.base import Host, Job
from mooncake_hpc.jobs.launchers.choice import command_line, environment
from mooncake_hpc.jobs.mpi import Launch

PASSED = ("MC_", "MOONCAKE_HPC_", "NUMBA_")  # beginnings of variables that ranks on other hosts get as well

FLAGS = FlagSet(
    "mooncake-hpc launch",
    "Starts ranks: mooncake-hpc launch --ranks=4 -- bench --protocol=tcp …. What follows -- is a command of "
    "mooncake-hpc or any other program. Inside a Slurm allocation srun starts the ranks, with the --mpi that fits the "
    "MPI library of mpi4py; else that library's mpirun does. In a shell of `srun --pty` they share that step's cores.",
    {
        "Where": (
            Flag("ranks", 0, "How many; 0: one for each slot of the host file, SLURM_NTASKS in Slurm, else 2.",
                 "processes"),
            Flag("hostfile", "", "File of hosts, one a line: h0, h0:4, or h0 slots=4. None: this host."),
            Flag("mpirun", "", "Path of the launcher; default: the one beside this Python, else in PATH."),
            Flag("remote_shell", "", "Program that starts a command on another host, in place of ssh."),
            Flag("bind", "", "Ties each rank to cores of its own, beside this RDMA device or network interface; "
                 "any: beside the first RDMA device, if there is one."),
        ),
        "Slurm": (
            Flag("srun_options", "", "Further words for srun, as in a shell: --srun_options='--het-group=0,1'."),
        ),
        "Look": (
            Flag("dry_run", False, "Print the command line and do not run it."),
            Flag("check", False, "Look whether the flags after -- can be, and start nothing."),
        ),
    },
    stray="the command to run comes after --, as in --ranks=4 -- bench --protocol=tcp",
)  # fmt: skip


def main(arguments: Sequence[str], command: Sequence[str] = ("mooncake-hpc", "launch")) -> int:
    """Become the launcher. Raises ConfigError."""
    own, program = _split(arguments)
    flags = FLAGS.parse(own, os.environ)
    if FLAGS.answer(flags):
        return 0
    if not program:
        raise ConfigError("nothing to run: mooncake-hpc launch --ranks=4 -- bench …")
    in_slurm = srun.in_allocation(os.environ)
    srun.check_once(os.environ)
    job = _job(flags, program, in_slurm, command[:-1])
    dry_run, check_only = flags.boolean("dry_run"), flags.boolean("check")
    _check(program, job.ranks, here=not (job.hosts or in_slurm or dry_run or check_only))
    if check_only:
        return 0
    words, launcher = command_line(job, flags.text("mpirun"), in_slurm, tuple(shlex.split(flags.text("srun_options"))))
    if dry_run:
        print(shlex.join(words))
        return 0
    sys.stdout.flush()
    try:
        os.execvpe(words[0], words, environment(launcher))
    except OSError as error:
        raise ConfigError(f"cannot run {words[0]}: {error.strerror}") from error


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    if "--" not in arguments:
        return arguments, ()
    place = list(arguments).index("--")
    return arguments[:place], arguments[place + 1 :]


def _check(program: Sequence[str], ranks: int, here: bool) -> None:
    """Tell of flags of our commands that cannot be: once, and before anything is started. Raises ConfigError.

    `here`: ranks are to run on this machine, so that what it does not have is told as well.
    """
    if program[0] == "bench":
        from mooncake_hpc.cli.transfer_engine_bench import check
    elif program[0] == "p2p":
        from mooncake_hpc.cli.p2p import check
    else:
        return
    try:
        check(program[1:], Launch("mooncake-hpc launch", 0, ranks), here)
    except ConfigError as error:
        raise ConfigError(f"{program[0]}: {error}") from error


def _job(flags: Parsed, program: Sequence[str], in_slurm: bool, myself: Sequence[str]) -> Job:
    """`myself` is the command before a subcommand's name."""
    from mooncake_hpc.__main__ import COMMANDS

    hosts = _hosts(flags.text("hostfile"))
    ranks = flags.integer("ranks") or sum(host.slots for host in hosts)
    if not ranks:
        ranks = srun.tasks(os.environ) if in_slurm else 2
    words = [*myself, *program] if program[0] in COMMANDS else list(program)
    if device := flags.text("bind"):
        words = [sys.executable, "-I", "-S", binding.__file__, device, *words]
    passed = tuple(sorted(name for name in os.environ if name.startswith(PASSED))) if hosts else ()
    return Job(ranks, words, hosts, passed, flags.text("remote_shell"), os.getuid() == 0, bool(device))


def _hosts(path: str) -> tuple[Host, ...]:
    if not path:
        return ()
    try:
        return hostfile.parse(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile={path} cannot be read: {error}") from error
