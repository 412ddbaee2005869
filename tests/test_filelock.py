"""The lock between processes: with flock(2), and where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, Start, clean_env

from mooncake_hpc.core.errors import LockHeld
from mooncake_hpc.core.filelock import FileLock

WAYS = ["flock", "none"]
HOLD = "lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"
TRY = "lock = FileLock(sys.argv[1]); lock.acquire(float(sys.argv[2])); print('taken'); lock.release()"
COUNT = """
for _ in range(30):
    with FileLock(sys.argv[1], timeout_s=60):
        before = int(open(sys.argv[2]).read())
        os.sched_yield()
        open(sys.argv[2], "w").write(str(before + 1))
"""


def command(way: str, code: str, *words: str) -> list[str]:
    prelude = "import os, sys\nfrom mooncake_hpc.core.filelock import FileLock\n"
    without = [sys.executable, str(ROOT / "tests" / "no_flock.py")] if way == "none" else []
    return [*without, sys.executable, "-P", "-c", prelude + code, *words]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    if request.param == "none":
        request.getfixturevalue("without_flock")
    return str(request.param)


@pytest.fixture
def without_flock() -> None:
    """Skips where flock(2) cannot be taken away from a process."""
    code = "import fcntl; fcntl.flock(sys.stdout, fcntl.LOCK_UN)"
    done = subprocess.run(command("none", code), env=clean_env(), capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("hardware: this kernel has no seccomp filters")
    assert "not implemented" in done.stderr, done


def test_one_process_at_a_time(way: str, start: Start, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    held = subprocess.Popen(
        command(way, HOLD, str(lock)), env=clean_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert held.stdout is not None and held.stdout.readline() == "held\n"
        refused = subprocess.run(command(way, TRY, str(lock), "0"), env=clean_env(), capture_output=True, text=True)
        assert refused.returncode == 1 and f"LockHeld: {lock} is locked by " in refused.stderr, refused
        waiting = start(*command(way, TRY, str(lock), "30"), env=clean_env())
        held.kill()  # it gives nothing back
        assert waiting.communicate(timeout=40)[0] == "taken\n"
        assert [*tmp_path.glob("lock.*")] == [], "claims of the dead and the living are gone"
    finally:
        held.kill()
        held.communicate(timeout=10)


def test_many_contenders(way: str, start: Start, tmp_path: Path) -> None:
    lock, counter = tmp_path / "lock", tmp_path / "counter"
    counter.write_text("0")
    for process in [start(*command(way, COUNT, str(lock), str(counter)), env=clean_env()) for _ in range(3)]:
        output, _ = process.communicate(timeout=90)
        assert process.returncode == 0, output
    assert counter.read_text() == "90"


def test_threads_of_one_process_exclude_one_another(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock") as first:
        with pytest.raises(LockHeld, match="lock is locked"):
            FileLock(tmp_path / "lock").acquire()
        taken: list[str] = []

        def take() -> None:
            with FileLock(tmp_path / "lock", timeout_s=30):
                taken.append("yes")

        thread = threading.Thread(target=take)
        thread.start()
        first.release()
        thread.join(40)
    assert taken == ["yes"]


def test_a_claim_of_another_machine_is_left_alone(without_flock: None, tmp_path: Path) -> None:
    other = tmp_path / "lock.elsewhere.0123456789abcdef.1.1.00000000"
    other.write_bytes(b"")
    (tmp_path / "lock.old").write_bytes(b"somebody's")
    done = subprocess.run(
        command("none", TRY, str(tmp_path / "lock"), "0"), env=clean_env(), capture_output=True, text=True
    )
    assert done.returncode == 1 and f"remove {other}" in done.stderr, done
    assert {path.name for path in tmp_path.iterdir()} == {"lock", other.name, "lock.old"}


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "lock").symlink_to(target)
    os.mkfifo(tmp_path / "fifo")
    for name in ("lock", "fifo"):
        with pytest.raises(OSError):
            FileLock(tmp_path / name).acquire()
    assert target.read_bytes() == b"precious"


def test_a_forked_child_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock") as lock:
        pid = os.fork()
        if pid == 0:
            lock.release()
            os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(LockHeld):
            FileLock(tmp_path / "lock").acquire()
