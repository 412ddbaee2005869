"""Ranks: who launched us, and coordination and reduction over MPI. The one module that imports mpi4py.

MPI only says when, and adds up; metadata goes through the metadata store and bytes through the engine. Waiting in
a blocking MPI call burns a core in every MPI library, so that all waits here test a request and sleep.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mooncake_hpc.core import process
from mooncake_hpc.core.errors import AuthenticationError, ConfigError, MetadataError, MooncakeError, SegmentNotFound
from mooncake_hpc.core.names import check_name
from mooncake_hpc.jobs.failures import Failure, Verdict
from mooncake_hpc.jobs.hosts import Host

if TYPE_CHECKING:
    from mooncake_hpc import TransferEngine

T = TypeVar("T")
FIRST_PORT = 12345  # default segment names under a launcher are <host>:<FIRST_PORT + rank>
LONGEST_MPICH_HOST = 63  # characters of a host's name that MPI_Init of MPICH 5 takes
LEAST_SHARED_BYTES = 4 << 20  # in /dev/shm; with 1 MiB MPICH's MPI_Init ends by SIGBUS
ARRIVAL = 1  # tag of the messages by which ranks arrive at rank 0
FORWARDING = 0.3  # seconds for a launcher to pass on what a rank said: srun drops what it has not, when it kills a step
POLL = (0.0002, 0.02)  # seconds between two tests of an MPI request: at first, and at most
AFTER_RANK_0 = 1.0  # seconds for rank 0 to tell what all ranks met with, before the end of another ends it
ANSWER = 1.0  # seconds for a rank to answer whether it lives
ANSWERS = 5.0  # seconds after which no further ranks are asked


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launcher's environment says about this process. `size` is 0 where it does not say."""

    launcher: str
    rank: int
    size: int


def detect(env: Mapping[str, str] | None = None) -> Launch | None:
    """The launcher of this process, from its environment alone; None for a process started by hand.

    An mpirun inside a Slurm step sets its own variables beside Slurm's, so Slurm's are looked at last; in a batch
    script, outside of any step, SLURM_STEP_NUM_TASKS is absent.
    """
    env = os.environ if env is None else env
    for launcher, rank, size in (
        ("Open MPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("a PMI launcher (MPICH's mpiexec, srun --mpi=pmi2)", "PMI_RANK", "PMI_SIZE"),
        ("MVAPICH's mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
        ("srun --mpi=pmix", "PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
        ("a PMIx launcher", "PMIX_RANK", ""),
        ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ):
        if rank in env and (not size or size in env):
            with contextlib.suppress(ValueError):
                return Launch(launcher, int(env[rank]), int(env[size]) if size else 0)
    return None


def default_name(launch: Launch | None, host: str | None = None) -> str:
    """The default segment name: the host's name, and under a launcher a port that differs by rank.

    Raises ConfigError for a host whose name is no text that others can be told.
    """
    host = host or socket.gethostname()
    check_name(host, "the host's name (--local_server_name gives another one)")
    return f"{host}:{FIRST_PORT + launch.rank}" if launch else host


@contextlib.contextmanager
def alike(launch: Launch | None) -> Iterator[None]:
    """Inside, a ConfigError is the same on every rank: rank 0 tells it, and the others end quietly, a little later."""
    try:
        yield
    except ConfigError:
        if launch is None or launch.rank == 0:
            raise
        time.sleep(AFTER_RANK_0)
        raise SystemExit(2) from None


def forget_shared_memory() -> None:
    """Take away the names of MPICH's shared memory, which all ranks of this host have opened in MPI_Init.

    MPICH does so only in MPI_Finalize, so that every job that is killed would leave some megabytes in /dev/shm.
    """
    with open("/proc/self/maps") as maps:
        names = {line.split()[-1] for line in maps if "/dev/shm/mpich_shm_" in line}
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _patience(rank: int) -> float:
    """Seconds that a rank waits longer than rank 0, which knows who is missing, and whose end ends the others."""
    return 2.5 * min(rank, 2)


def _import_mpi(launch: Launch) -> Any:
    """mpi4py's MPI, initialised; ConfigError where there is none."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(f"started by {launch.launcher}, but mpi4py is missing or has no MPI: {error}") from None
    except RuntimeError as error:
        raise ConfigError(f"started by {launch.launcher}, but no MPI library can be loaded: {error}") from error
    if not MPI.Is_initialized():  # mpi4py.rc.initialize was switched off: then that is the host program's to do
        raise ConfigError("mpi4py does not initialise MPI in this process: call MPI.Init() before")
    return MPI


def _check_host(launch: Launch) -> None:
    """Raise ConfigError where MPICH's MPI_Init would end this process: by an abort or SIGBUS, with no word of why."""
    if "MPICH" not in launch.launcher or "mpi4py.MPI" in sys.modules:
        return
    host = socket.gethostname()
    if len(os.fsencode(host)) > LONGEST_MPICH_HOST:
        raise ConfigError(
            f"MPICH does not start on a host whose name has over {LONGEST_MPICH_HOST} characters: {host}; "
            "shorten it, or take Open MPI"
        )
    with contextlib.suppress(OSError):
        shared = os.statvfs("/dev/shm")
        if shared.f_bavail * shared.f_frsize < LEAST_SHARED_BYTES:
            raise ConfigError(
                f"MPICH needs at least {LEAST_SHARED_BYTES} bytes in /dev/shm of {host}, of which "
                f"{shared.f_bavail * shared.f_frsize} are free: remove files there, or mount it larger"
            )


@contextlib.contextmanager
def _watch_init(launch: Launch, seconds: float) -> Iterator[None]:
    """End this process with a message where MPI_Init does not come back, as it waits for ranks without a deadline.

    Another process watches: MPI_Init holds the interpreter's lock, so that no thread of ours could.
    """
    if "mpi4py.MPI" in sys.modules:  # initialised by the host program, or about to be
        yield
        return
    message = (
        f"rank {launch.rank} on {socket.gethostname()}: MPI_Init has waited {seconds:.0f} s for the other ranks: "
        "one of them did not start, or hangs before it gets there"
    )
    script = 'read -t "$1" -r _; [ $? -le 128 ] || { echo "$2" >&2; kill -KILL "$3"; }'
    command = ["bash", "-c", script, "watch", str(seconds + _patience(launch.rank)), message, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as watcher:
        yield
        watcher.communicate()  # it reads the end of file, and leaves


class World:
    """The ranks of a job. Every collective call has a deadline in seconds and raises TimeoutError, never hangs.

    Ranks arrive at rank 0 one by one instead of in MPI_Barrier, so that it can say who is missing. The traffic has a
    communicator of its own and never meets the host program's.
    """

    def __init__(self, launch: Launch, comm: Any = None, *, settle: float = 60.0) -> None:
        """All ranks of `comm`, an MPI.Intracomm of a program that has initialised MPI; else COMM_WORLD.

        MPI is initialised only where it is not yet, and never finalised by us. Where other ranks do not reach
        MPI_Init within `settle` seconds this process ends with a message, as MPI_Init knows no deadline. Raises
        ConfigError when the MPI library does not belong to the launcher or this thread may not call MPI.
        """
        self._process = process.here
        _check_host(launch)
        with _watch_init(launch, settle):
            self._mpi = MPI = _import_mpi(launch)
        whole = comm is None
        comm = MPI.COMM_WORLD if whole else comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        if whole and launch.size and self.size != launch.size:
            library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
            raise ConfigError(
                f"{launch.launcher} started {launch.size} processes, but to mpi4py's MPI library ({library}) the job "
                f"has size {self.size}: the launcher and the library do not match. Use the mpirun of that library, "
                f"or install the library of this launcher (`python -m mpi4py --mpi-library` shows it)"
            )
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED and not MPI.Is_thread_main():
            raise ConfigError("MPI was initialised for calls by its main thread alone, and this is another thread")
        self.host = Host.here()
        self.hosts: list[Host] = []  # by rank
        self._barriers, self._patience = 0, _patience(self.rank)
        self._suspects: frozenset[int] = frozenset()  # ranks that did not answer when a transfer failed
        self._announced: Verdict | None = None  # MPI may still use its memory
        self._abort = comm.Abort
        self._comm, duplicated = comm.Idup()  # completes in the first barrier
        # of the barrier under way; kept when it fails, as MPI still uses their buffers
        self._requests, self._word = [duplicated], bytearray(1)
        self.hosts = self.allgather(self.host, settle, "all ranks start")
        forget_shared_memory()

    def barrier(self, timeout: float, what: str) -> None:
        """Wait for all ranks. TimeoutError says `what` was waited for, and who is missing."""
        process.check(self)
        deadline = time.monotonic() + timeout + self._patience
        self._barriers += 1
        self._wait(lambda: self._mpi.Request.Testall(self._requests), deadline, timeout, what)
        if self.rank == 0:
            self._collect(deadline, timeout, what)
        else:
            self._requests.append(self._comm.isend(self._barriers, dest=0, tag=ARRIVAL))
        # a broadcast's receivers leave when rank 0 has entered it
        self._requests.append(self._comm.Ibcast(self._word, root=0))
        self._wait(lambda: self._mpi.Request.Testall(self._requests), deadline, timeout, what)
        self._requests.clear()

    def _collect(self, deadline: float, timeout: float, what: str) -> None:
        """On rank 0: the arrivals of all others at this barrier."""
        missing = set(range(1, self.size))

        def all_are_here() -> bool:
            while missing and self._comm.iprobe(tag=ARRIVAL):
                status = self._mpi.Status()
                if self._comm.recv(tag=ARRIVAL, status=status) == self._barriers:
                    missing.discard(status.Get_source())
            return not missing

        try:
            self._wait(all_are_here, deadline, timeout, what)
        except TimeoutError:
            raise TimeoutError(
                f"{self._names(missing)} did not come within {timeout:.0f} s to: {what} (the other "
                f"{self.size - len(missing)} of {self.size} ranks did)"
            ) from None

    def _names(self, ranks: AbstractSet[int]) -> str:
        """`rank 3 on h1, rank 4 on h2`, at most eight of them."""
        shown = [
            f"rank {rank} on {self.hosts[rank].name}" if self.hosts else f"rank {rank} (never heard of)"
            for rank in sorted(ranks)[:8]
        ]
        return ", ".join(shown) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def gather(self, value: T, timeout: float, what: str) -> list[T]:
        """Every rank's value, by rank, on rank 0; an empty list on the others."""
        process.check(self)
        self.barrier(timeout, what)
        return self._comm.gather(value, root=0) or []

    def allgather(self, value: T, timeout: float, what: str) -> list[T]:
        """Every rank's value, by rank."""
        process.check(self)
        self.barrier(timeout, what)
        result: list[T] = self._comm.allgather(value)
        return result

    def broadcast(self, value: T | None, timeout: float, what: str) -> T:
        """Rank 0's value on every rank."""
        process.check(self)
        self.barrier(timeout, what)
        result: T = self._comm.bcast(value, root=0)
        return result

    def _wait(self, done: Callable[[], bool], deadline: float, timeout: float, what: str) -> None:
        pause = POLL[0]
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout:.0f} s for all {self.size} ranks: {what}")
            time.sleep(pause)
            pause = min(pause * 1.5, POLL[1])

    def abort(self, code: int) -> None:
        """End all ranks of the job at once with a non-zero exit code; does not return."""
        process.check(self)
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(FORWARDING)
        self._abort(code)
        os._exit(code)  # MPICH under srun returns, and leaves it to Slurm to kill us a little later

    @contextlib.contextmanager
    def suspecting(self, engine: TransferEngine, names: Sequence[str]) -> Iterator[None]:
        """Inside, where a transfer or so fails, the ranks of these segments (by rank) that do not answer are named."""
        process.check(self)
        self._suspects = frozenset()
        try:
            yield
        except MooncakeError as error:
            if self._process is not process.here:
                raise
            self._suspects = _silent(engine, {rank: name for rank, name in enumerate(names) if rank != self.rank})
            self._announced = self._verdict(error)
            self._announced.announce()  # the engine closes next, and then answers nobody
            raise

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Inside, an exception on any rank ends the job with its message, as others may wait: exit code 2 for a
        ConfigError, else 1. Where several ranks fail one of them tells, each cause once.

        A rank that is stopped by a signal says nothing: who sends it knows, and it is no cause of the job's end. A
        forked child of a rank ends alone.
        """
        process.check(self)
        try:
            yield
        except BaseException as error:
            if self._process is not process.here or (isinstance(error, SystemExit) and not error.code):
                raise
            with contextlib.suppress(KeyboardInterrupt):
                self._tell(error)
            self.abort(_exit_code(error))
            raise

    def _tell(self, error: BaseException) -> None:
        """Print what this rank is to say of its failure, if anything."""
        if isinstance(error, KeyboardInterrupt):
            return
        for each in self._verdict(error).to_tell():
            silent = f"; no answer from {self._names(each.suspects)}" if each.suspects else ""
            print(f"{each.line}{silent}", file=sys.stderr)

    def _verdict(self, error: BaseException) -> Verdict:
        """On what this rank met with."""
        cause = f"{type(error).__name__}: {error}".removesuffix(": ")
        line = f"rank {self.rank} on {self.host.name}: {cause}"
        if not isinstance(error, MooncakeError | TimeoutError | SystemExit):
            line = f"{traceback.format_exc()}{line}"
        return Verdict(self._comm, Failure(self.rank, line, cause, self._suspects))


def _silent(engine: TransferEngine, names: Mapping[int, str]) -> frozenset[int]:
    """Ranks whose segments do not answer, as far as can be found out."""
    found, deadline = set(), time.monotonic() + ANSWERS
    with contextlib.suppress(MetadataError):
        for rank, name in names.items():
            if time.monotonic() < deadline and not _answers(engine, name):
                found.add(rank)
    return frozenset(found)


def _answers(engine: TransferEngine, name: str) -> bool:
    try:
        return engine.probe(name, ANSWER)
    except AuthenticationError:  # it lives
        return True
    except SegmentNotFound:
        return False


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ConfigError) else 1
