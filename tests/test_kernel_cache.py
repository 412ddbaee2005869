"""Where compiled kernels are kept: where nobody else can write; and no bad file or disk stops a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

from mooncake_hpc.cli import warm
from mooncake_hpc.native import cache_files as files
from mooncake_hpc.native.cache_folder import choose, distrust

ONE_KERNEL = """
from numba import types
from mooncake_hpc.native import spin
spin.budget.compile((types.int64,))
print("kept" if sum(spin.budget.stats.cache_hits.values()) else "compiled")
"""
STRANGER = 4321  # a user of no file here

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root gives files to others and mounts")


def use(folder: Path | str, *before: str, **env: str) -> tuple[str, list[str]]:
    """What a process says that needs a kernel, and its log's lines."""
    command = [*before, sys.executable, "-P", "-c", ONE_KERNEL]
    run = subprocess.run(
        command,
        env=clean_env(NUMBA_CACHE_DIR=str(folder), **env),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    return run.stdout.strip(), run.stderr.splitlines()


def kernel_in(folder: Path) -> Path:
    (file,) = folder.glob("spin.budget.*.nbc")
    return file


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A kernel's file."""
    folder = tmp_path_factory.mktemp("kept") / "cache"
    assert use(folder) == ("compiled", [])
    assert use(folder) == ("kept", [])
    return kernel_in(folder).read_bytes()


@pytest.fixture
def cache(tmp_path: Path, kept: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that file, under the name that it had."""
    (first,) = tmp_path_factory.getbasetemp().glob("kept0/cache/spin.budget.*.nbc")
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    (folder / first.name).write_bytes(kept)
    return folder


# ---- which folder


def test_the_folder_is_the_one_named_else_one_of_this_user_else_none(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path / "home")}
    assert choose({**home, "NUMBA_CACHE_DIR": str(tmp_path / "named")}).path == str(tmp_path / "named")
    assert choose({**home, "XDG_CACHE_HOME": str(tmp_path / "xdg")}).path == f"{tmp_path}/xdg/mooncake_hpc/kernels"
    (tmp_path / "file").touch()
    nowhere = choose({"XDG_CACHE_HOME": str(tmp_path / "file"), "NUMBA_CACHE_DIR": "/proc/none"})
    assert nowhere.path == "" and len(nowhere.notes) == 3 and "set NUMBA_CACHE_DIR" in nowhere.notes[-1]


def test_the_home_folder_is_used_and_nothing_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    in_tmp = Path(f"/tmp/mooncake-hpc-{os.getuid()}")  # a Slurm job's, where TMPDIR is not set
    before = in_tmp.exists()
    assert choose({"HOME": str(tmp_path)}).path == f"{tmp_path}/.cache/mooncake_hpc/kernels"
    assert in_tmp.exists() == before


def test_a_folder_that_is_made_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert choose({"NUMBA_CACHE_DIR": str(tmp_path / "a" / "b")}).notes == ()
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b")] == [0o700, 0o700]


@pytest.mark.parametrize(
    ("makes", "says"),
    [
        (lambda at: at.chmod(0o770), "others can write"),
        (lambda at: at.chmod(0o1777), "others can write"),
        (lambda at: at.parent.chmod(0o777), "others can write"),
        (lambda at: at.parent.chmod(0o775), "others can write") if os.geteuid() else
        (lambda at: at.parent.chmod(0o707), "others can write"),
        (lambda at: (at.rename(at.with_name("x")), at.symlink_to(at.with_name("x"))), "is a link"),
        (lambda at: (at.rmdir(), at.touch()), "no folder"),
        pytest.param(lambda at: os.chown(at, STRANGER, 0), f"belongs to user {STRANGER}", marks=as_root),
        pytest.param(
            lambda at: (os.chown(at.parent, STRANGER, 0), at.parent.chmod(0o775)), "others can write", marks=as_root
        ),
    ],
)  # fmt: skip
def test_a_folder_that_others_can_write_to_is_passed_over(
    tmp_path: Path, makes: Callable[[Path], object], says: str
) -> None:
    at = tmp_path / "above" / "cache"
    at.mkdir(mode=0o700, parents=True)
    assert distrust(str(at)) == ""
    makes(at)
    choice = choose({"NUMBA_CACHE_DIR": str(at), "XDG_CACHE_HOME": str(tmp_path / "mine")})
    assert choice.path == f"{tmp_path}/mine/mooncake_hpc/kernels"
    (note,) = choice.notes
    assert says in note and str(at) in note


@as_root
def test_a_folder_of_roots_and_a_link_of_ours_above_it_are_trusted(tmp_path: Path) -> None:
    at = tmp_path / "above" / "cache"
    at.mkdir(parents=True)
    (tmp_path / "link").symlink_to(at.parent)
    assert distrust(str(tmp_path / "link" / "cache")) == ""
    os.lchown(tmp_path / "link", STRANGER, 0)
    assert f"link of user {STRANGER}" in distrust(str(tmp_path / "link" / "cache"))


# ---- what lies there


@pytest.mark.parametrize("spoil", [
    lambda whole: b"", lambda whole: whole[:30], lambda whole: whole[:1000], lambda whole: whole[:-1],
    lambda whole: bytes(len(whole)), lambda whole: whole[:500] + bytes(len(whole) - 500),
    lambda whole: whole[:60] + bytes([whole[60] ^ 1]) + whole[61:], lambda whole: whole + b"x",
])  # fmt: skip
def test_no_torn_file_is_unpickled(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    file = tmp_path / f"a{files.SUFFIX}"
    files.write(str(file), bytes(files.DIGEST_BYTES), os.urandom(2000))
    assert files.whole(str(file))
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(files.TornFile):
        files.read(str(file))


def test_a_torn_file_is_told_in_one_line_and_compiled_anew(cache: Path) -> None:
    file = kernel_in(cache)
    os.truncate(file, 1000)
    said, log = use(cache)
    assert said == "compiled" and len(log) == 1 and str(file) in log[0] and "torn" in log[0], log
    assert use(cache) == ("kept", [])


def test_a_file_that_others_could_have_written_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / f"a{files.SUFFIX}"
    before = os.umask(0)
    try:
        files.write(str(file), bytes(files.DIGEST_BYTES), b"code")
    finally:
        os.umask(before)
    assert files.whole(str(file))
    file.chmod(0o646)
    with pytest.raises(PermissionError):
        files.read(str(file))
    file.chmod(0o600)
    (tmp_path / "link").symlink_to(file)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(OSError, match=name):
            files.read(str(tmp_path / name))


def test_a_full_disk_costs_one_line(tmp_path: Path) -> None:
    script = 'ulimit -f 8; trap "" XFSZ; exec "$@"'  # no file over 8 KiB
    said, log = use(tmp_path / "cache", "bash", "-c", script, "limited")
    assert said == "compiled" and len(log) == 1 and "cannot be kept" in log[0], log
    assert not list((tmp_path / "cache").iterdir()), "an unfinished file is left"


@as_root
def test_a_read_only_folder_is_used_for_what_it_has(cache: Path) -> None:
    script = f'mount --bind {cache} {cache} && mount -o remount,bind,ro {cache} && exec "$@"'
    read_only = ["unshare", "-m", "bash", "-c", script, "read-only"]
    assert use(cache, *read_only) == ("kept", [])
    kernel_in(cache).unlink()
    said, log = use(cache, *read_only)
    assert said == "compiled" and len(log) == 1 and "Read-only file system" in log[0], log


@pytest.mark.slow
def test_processes_that_start_at_once_on_a_torn_cache_all_work(cache: Path) -> None:
    os.truncate(kernel_in(cache), 100)
    command = [sys.executable, "-P", "-c", ONE_KERNEL]
    env = clean_env(NUMBA_CACHE_DIR=str(cache))
    several = [
        subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(8)
    ]
    ended = [process.communicate(timeout=120) for process in several]
    assert [process.returncode for process in several] == [0] * 8, ended
    assert use(cache) == ("kept", []) and [file.suffix for file in cache.iterdir()] == [".nbc"]


HOST = """
import os, numba
from numba import njit
before = dict(os.environ), numba.config.CACHE_DIR
from mooncake_hpc.native import spin
spin.budget.compile((numba.types.int64,))
assert sum(spin.budget.stats.cache_hits.values()) == 1
@njit
def f(x): return x
assert (dict(os.environ), numba.config.CACHE_DIR) == before
assert type(f._cache).__name__ == "NullCache"
"""


def test_nothing_of_numbas_is_changed_for_others(cache: Path) -> None:
    env = clean_env(NUMBA_CACHE_DIR=str(cache))
    run = subprocess.run([sys.executable, "-P", "-c", HOST], env=env, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


# ---- warm


def test_warm_looks_at_the_files_that_its_stamp_names(tmp_path: Path) -> None:
    stamp, file = tmp_path / "warm-x", tmp_path / f"a{files.SUFFIX}"
    assert not warm._all_whole(stamp)
    files.write(str(file), bytes(files.DIGEST_BYTES), b"code")
    warm._write_stamp(stamp)
    assert warm._all_whole(stamp)
    os.truncate(file, file.stat().st_size - 1)
    assert not warm._all_whole(stamp)
    file.unlink()
    assert not warm._all_whole(stamp)
    stamp.write_bytes(b"")
    assert not warm._all_whole(stamp)


def test_warm_follows_no_link_in_the_place_of_its_lock(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "warm.lock").symlink_to(tmp_path / "precious")
    from mooncake_hpc.jobs.kernel_cache import _one_at_a_time

    with _one_at_a_time(str(tmp_path / "cache")):
        pass
    assert (tmp_path / "precious").read_text() == "kept"
