"""Limits of a process and of its machine: each command works, or ends in one line that says which limit it met."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import ROOT, Start, clean_env
from test_cli import SMALL

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-P", "-m", "mooncake_hpc"]
EXCHANGE = """
import sys
from mooncake_hpc.core.errors import MooncakeError
from mooncake_hpc.jobs.kernel_cache import transfer
try:
    transfer(sys.argv[1])
except MooncakeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print("works")
"""
SHOW_FOLDER = "from mooncake_hpc.native.cache_folder import kernel_folder; print(kernel_folder())"
SET_HOST_NAME = """
import ctypes, os, sys
libc, name = ctypes.CDLL(None, use_errno=True), os.fsencode(sys.argv[1])
if libc.unshare(0x04000000) or libc.sethostname(name, len(name)):  # CLONE_NEWUTS
    sys.exit(os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[2], sys.argv[2:])
"""
# Another user, since root has no limit of processes, who may read this interpreter wherever it is.
OTHER_USER = [
    "setpriv", "--reuid=54321", "--regid=54321", "--clear-groups",
    "--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override",
]  # fmt: skip

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root makes namespaces, cgroups and other users")


def run(
    *words: str,
    before: Sequence[str] = (),
    limits: str = "true",
    env: dict[str, str] | None = None,
    seconds: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run `words` under what `limits` sets in a shell, started by `before`."""
    command = [*before, "bash", "-c", f'{limits} && exec "$@"', "limited", *words]
    shown = subprocess.run(
        command, env=clean_env() if env is None else env, capture_output=True, text=True, timeout=60, cwd=ROOT,
        stdin=subprocess.DEVNULL, errors="replace",
    )  # fmt: skip
    assert "Traceback" not in shown.stderr, shown.stderr
    return shown


def exchange(protocol: str, **more: object) -> str:
    """The closing line of a process in which two engines exchange a block."""
    shown = run(sys.executable, "-P", "-c", EXCHANGE, protocol, **more)  # type: ignore[arg-type]
    return (shown.stdout if shown.returncode == 0 else shown.stderr).splitlines()[-1]


# ---- descriptors, processes, address space


@pytest.mark.parametrize("count", [8, 16])
def test_too_few_descriptors_are_told(count: int) -> None:
    said = exchange("tcp", limits=f"ulimit -n {count}")
    assert "Error: " in said and ("ulimit -n" in said or "Too many open files" in said)


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
def test_few_descriptors_are_enough(protocol: str) -> None:
    assert exchange(protocol, limits="ulimit -n 48") == "works"


@as_root
@pytest.mark.parametrize("count", [1, 5])
def test_too_few_processes_are_told(count: int) -> None:
    # OpenBLAS, which numpy loads, interrupts a process that cannot have its threads
    said = exchange("tcp", before=OTHER_USER, limits=f"export OPENBLAS_NUM_THREADS=1; ulimit -u {count}")
    assert said.startswith("LimitError: ") and "ulimit -u" in said


@as_root
def test_few_processes_are_enough() -> None:
    assert exchange("tcp", before=OTHER_USER, limits="ulimit -u 24") == "works"


def test_too_little_address_space_is_told() -> None:
    shown = run(*COMMAND, "bench", "--mode=target", "--metadata_server=P2PHANDSHAKE", "--protocol=tcp",
                "--local_server_name=127.0.0.1:21123", f"--buffer_size={3 << 30}",
                limits="ulimit -v 3000000")  # fmt: skip
    assert shown.returncode in (1, 2) and len(shown.stderr.splitlines()) == 1, shown
    assert "Error: " in shown.stderr and "memory" in shown.stderr.lower()


# ---- memory


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A cgroup below ours of 256 MiB, of version 1 or 2."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    ours = {controllers: path.lstrip("/") for _, controllers, path in lines}
    if "memory" in ours:
        folder, limit = Path("/sys/fs/cgroup/memory", ours["memory"]), "memory.limit_in_bytes"
    else:  # a group of version 2 that has processes gives its children no controllers: one above ours may
        root, limit = Path("/sys/fs/cgroup"), "memory.max"
        above = [root / ours.get("", ""), *(root / ours.get("", "")).parents]
        giving = [at for at in above if "memory" in _text(at / "cgroup.subtree_control").split()]
        folder = giving[0] if giving else root
    made = folder / f"mooncake-test-{uuid.uuid4().hex[:8]}"
    try:
        made.mkdir()
        (made / limit).write_text(str(256 << 20))
    except OSError as error:
        if made.exists():
            made.rmdir()
        if os.environ.get("CI") and os.access(folder, os.W_OK):
            raise
        pytest.skip(f"hardware: no memory cgroup can be made here: {error}")
    yield made
    made.rmdir()


@as_root
def test_more_memory_than_the_cgroup_has_is_told(small_cgroup: Path) -> None:
    enter = f"echo $$ >{small_cgroup}/cgroup.procs"
    shown = run(*COMMAND, "bench", "--mode=target", "--metadata_server=P2PHANDSHAKE", "--protocol=tcp",
                "--local_server_name=127.0.0.1:21124", f"--buffer_size={300 << 20}", limits=enter)  # fmt: skip
    assert shown.returncode == 2 and f"{256 << 20} bytes of memory" in shown.stderr, shown
    assert exchange("shm", limits=enter) == "works"


@as_root
def test_a_small_shared_memory_is_told_before_mpi_starts(mpirun: str) -> None:
    small = "mount -t tmpfs -o size=1m none /dev/shm"
    unshare = ["unshare", "-m"]
    assert exchange("shm", before=unshare, limits=small) == "works"
    ranks = [*COMMAND, "launch", f"--mpirun={mpirun}", "--ranks=2", "--", "bench", "--metadata_server=embedded"]
    shown = run(*ranks, "--protocol=tcp", *SMALL, before=unshare, limits=small)
    assert shown.returncode and "bytes in /dev/shm" in shown.stderr and "ConfigError" in shown.stderr, shown


# ---- disk and home


@as_root
def test_a_disk_that_is_full_in_the_middle_of_out(etcd: str, start: Start, tmp_path: Path) -> None:
    p2p = [*COMMAND, "p2p", f"--metadata_server={etcd}", "--protocol=tcp", "--name=too-large-for-the-disk"]
    trainer = start(*p2p, "--cmd=trainer", "--local_server_name=t:21125", f"--size={16 << 20}", "--idle=60")
    assert trainer.stdout is not None and trainer.stdout.readline()
    small = f"mount -t tmpfs -o size=6m none {tmp_path}"
    pull = [*p2p, "--cmd=inferencer", "--local_server_name=r:21126", f"--out={tmp_path}/model", "--timeout=30"]
    shown = run(*pull, before=["unshare", "-m"], limits=small)
    assert shown.returncode == 1 and len(shown.stderr.splitlines()) == 1, shown
    assert "No space left" in shown.stderr or "no space is left" in shown.stderr


@pytest.mark.parametrize("home", ["/proc", "/proc/self/none", "relative"])
def test_without_a_home_kernels_are_kept_nowhere_and_one_line_says_so(home: str) -> None:
    env = {name: value for name, value in clean_env().items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    shown = run(sys.executable, "-P", "-c", SHOW_FOLDER, env={**env, "HOME": home})
    assert shown.stdout == "\n" and "set NUMBA_CACHE_DIR" in shown.stderr.splitlines()[-1], shown


def test_no_home_is_needed_where_kernels_are_kept_elsewhere() -> None:
    env = {name: value for name, value in clean_env().items() if name != "HOME"}
    assert exchange("tcp", env=env) == "works"


# ---- the host's name


def named(host: str | bytes) -> list[str | bytes]:
    return [sys.executable, "-c", SET_HOST_NAME, host]


@as_root
@pytest.mark.parametrize("host", ["h" * 64, "a" * 40 + "." + "b" * 23, b"n\xfcd\xe9".decode(errors="surrogateescape")])
def test_engines_work_whatever_the_hosts_name_is(host: str) -> None:
    assert exchange("auto" if host.isascii() else "tcp", before=named(host)) == "works"


@as_root
def test_a_host_name_that_is_no_text_cannot_be_a_segments_default_name() -> None:
    host = b"n\xfcd\xe9".decode(errors="surrogateescape")
    target = [*COMMAND, "bench", "--mode=target", "--metadata_server=P2PHANDSHAKE", "--protocol=tcp", *SMALL]
    shown = run(*target, before=named(host))  # type: ignore[arg-type]
    assert shown.returncode == 2 and len(shown.stderr.splitlines()) == 1, shown
    assert "--local_server_name" in shown.stderr


@as_root
def test_a_host_name_that_is_too_long_for_mpich_is_told(mpirun: str) -> None:
    ranks = [*COMMAND, "launch", f"--mpirun={mpirun}", "--ranks=2", "--", "bench", "--metadata_server=embedded"]
    shown = run(*ranks, "--protocol=tcp", *SMALL, before=named("h" * 64))  # type: ignore[arg-type]
    assert shown.returncode and "over 63 characters" in shown.stderr and "MPIR_" not in shown.stderr, shown
