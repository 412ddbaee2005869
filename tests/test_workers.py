"""The worker pool: same results as without it, whatever dies; and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mooncake_hpc.core.errors import ConfigError, ForkError, TransferTimeout, WorkerError
from mooncake_hpc.core.memory import MemoryFile
from mooncake_hpc.native import prepare
from mooncake_hpc.workers import ring_kernels as ring
from mooncake_hpc.workers.pool import Job, WorkerPool
from mooncake_hpc.workers.process import worker_environment

SIZE = (8 << 20) + 4099
ROOT = Path(__file__).parents[1]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def finish_alone(job: Job) -> None:
    """Wait without helping."""
    until(lambda: job.done)


def wait_until_working(pool: WorkerPool) -> None:
    """Until each worker has mapped a file, so that a slow start does not leave all work to this process."""
    with MemoryFile(4 << 20, "warm-up") as memory:
        while not all("memfd:warm-up" in maps(pid) for pid in pool.pids):
            finish_alone(pool.poison(memory.array))


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.fixture
def two() -> Iterator[MemoryFile]:
    with MemoryFile(2 * SIZE) as memory:
        yield memory


@pytest.mark.parametrize("count", [0, 1, 2])
def test_results_are_those_of_the_kernels(count: int, two: MemoryFile) -> None:
    a, b = two.array[3 : 3 + SIZE], two.array[SIZE + 5 :]
    with WorkerPool(count) as pool:
        if count:
            wait_until_working(pool)
        pool.touch(two.array).wait()
        assert pool.fill(a, 5, 77, 2).wait() == 0
        assert prepare.verify(a, 5, 77, 2) == 0 and not b.any()
        a[[0, 1 << 20, SIZE - 1]] ^= 1
        assert pool.verify(a, 5, 77, 2).wait() == 3
        assert pool.checksum(a).wait() == prepare.checksum(a)
        block, stride = 1000, 1777
        count = a.size // stride
        expected = np.zeros_like(b)
        prepare.gather(a, expected, block, stride, count)
        pool.gather(a, b, block, stride, count).wait()
        np.testing.assert_array_equal(b, expected)
        packed = b.copy()
        pool.poison(a, 0x11).wait()
        spread = a.copy()
        assert (spread == 0x11).all()
        pool.scatter(b, a, block, stride, count).wait()
        prepare.scatter(packed, spread, block, stride, count)
        np.testing.assert_array_equal(a, spread)


def test_workers_do_the_work_while_nobody_waits(two: MemoryFile) -> None:
    with WorkerPool(2) as pool:
        job = pool.fill(two.array, 1)
        finish_alone(job)
        assert job.wait(0) == 0 and prepare.verify(two.array, 1) == 0


def test_small_and_private_arrays_are_done_at_once(two: MemoryFile) -> None:
    private = np.zeros(SIZE, np.uint8)
    with WorkerPool(1) as pool:
        for array in (two.array[:1000], private):
            assert pool.fill(array, 3).done
            assert pool.verify(array, 3).wait() == 0


def test_arguments_are_checked(two: MemoryFile) -> None:
    frozen = two.array[:]
    frozen.flags.writeable = False
    with WorkerPool(0) as pool:
        with pytest.raises(ConfigError, match="read-only"):
            pool.fill(frozen, 1)
        with pytest.raises(ConfigError, match="blocks"):
            pool.gather(two.array, two.array[:10], 4096, 8192, 100)
        assert pool.verify(frozen, 1).wait() > 0
    for count in (-1, 1000):
        with pytest.raises(ConfigError, match="workers"):
            WorkerPool(count)


@pytest.mark.slow
def test_many_threads_and_more_jobs_than_slots(two: MemoryFile) -> None:
    half = [two.array[:SIZE], two.array[SIZE:]]
    with WorkerPool(2) as pool:
        for array in half:
            pool.fill(array, 9).wait()
        expected = [prepare.checksum(array) for array in half]
        wrong: list[int] = []

        def run(index: int) -> None:
            jobs: list[Job] = [pool.checksum(half[index % 2]) for _ in range(ring.JOBS)]
            wrong.extend(job.wait() for job in jobs if job.wait() != expected[index % 2])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def held_by(pool: WorkerPool, owner: int) -> bool:
    """Whether worker `owner` is at a piece now."""
    words = pool._words[ring.SLOTS : ring.SLOTS + ring.JOBS * ring.SLOT_BYTES].view(np.int64)
    slots = words.reshape(ring.JOBS, -1)
    states = slots[:, ring.STATES // 8 : ring.RESULTS // 8]
    return bool((states & ring.OWNER_MASK == owner).any())


@pytest.mark.slow
def test_what_a_killed_worker_held_is_done_again() -> None:
    with MemoryFile(256 << 20) as memory, WorkerPool(1) as pool:
        wait_until_working(pool)
        pid = pool.pids[0]
        job = pool.fill(memory.array, 4)
        until(lambda: held_by(pool, 1))
        os.kill(pid, signal.SIGSTOP)
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        assert held_by(pool, 1)
        with pytest.raises(TransferTimeout, match="not done"):
            job.wait(1)
        os.kill(pid, signal.SIGKILL)
        assert job.wait(30) == 0
        assert prepare.verify(memory.array, 4) == 0
        assert not alive(pid) and pool.pids != [pid]


@pytest.mark.slow
def test_kills_at_work_lose_nothing() -> None:
    """Rounds of fill, checksum and gather; a worker is killed whenever one is at a piece; each round is compared."""
    kills = 0
    with MemoryFile(32 << 20) as memory, MemoryFile(16 << 20) as packed, WorkerPool(2, respawns=1000) as pool:
        stop = threading.Event()

        def kill() -> None:
            nonlocal kills
            while not stop.wait(0.001):
                for owner, pid in enumerate(pool.pids, 1):
                    if held_by(pool, owner) and alive(pid):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                            kills += 1

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            end, round = time.monotonic() + 30, 0
            while kills < 5 and time.monotonic() < end:
                round += 1
                pool.fill(memory.array, 1, 0, round).wait(30)
                assert prepare.verify(memory.array, 1, 0, round) == 0
                assert pool.checksum(memory.array).wait(30) == prepare.checksum(memory.array)
                pool.gather(memory.array, packed.array, 4096, 8192, 4096).wait(30)
                rows = memory.array.reshape(-1, 8192)[:, :4096]
                assert np.array_equal(packed.array.reshape(-1, 4096), rows)
        finally:
            stop.set()
            killer.join()
    assert kills >= 5


def test_workers_that_keep_dying_are_an_error(two: MemoryFile) -> None:
    with WorkerPool(1, respawns=2) as pool:
        with pytest.raises(WorkerError, match=r"3 workers died within a minute.*status -9"):
            while True:
                os.kill(pool.pids[0], signal.SIGKILL)
                pool.fill(two.array, 1).wait(10)
        with pytest.raises(WorkerError, match="0 workers"):
            pool.fill(two.array, 1)
        assert pool.pids == []


@pytest.mark.slow
def test_close_leaves_nothing() -> None:
    def state() -> tuple[list[str], list[str], int]:
        gc.collect()
        links = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        shared = [name for name in os.listdir("/dev/shm") if "mpich" not in name]  # other processes' own
        return sorted(links) + children, shared, threading.active_count()

    WorkerPool(1).close()  # what numba opens once stays open
    before = state()
    for _ in range(3):
        with WorkerPool(2) as pool, MemoryFile(4 << 20) as memory:
            pool.fill(memory.array, 1).wait()
            pids = pool.pids
            os.kill(pids[0], signal.SIGKILL)
        assert not any(map(alive, pids))
        pool.close()
        del memory
    assert state() == before


@pytest.mark.slow
def test_a_stuck_worker_does_not_hold_up_close(two: MemoryFile) -> None:
    pool = WorkerPool(1)
    wait_until_working(pool)
    pid = pool.pids[0]
    os.kill(pid, signal.SIGSTOP)
    job = pool.fill(two.array, 6)
    start = time.monotonic()
    pool.close(timeout=0.3)
    assert time.monotonic() - start < 2 and not alive(pid)
    assert job.wait() == 0 and prepare.verify(two.array, 6) == 0


@pytest.mark.slow
def test_a_closed_file_is_given_back_by_the_workers() -> None:
    with WorkerPool(1) as pool:
        memory = MemoryFile(8 << 20, "given-back")
        wait_until_working(pool)
        finish_alone(pool.poison(memory.array))
        assert "given-back" in maps(pool.pids[0])
        memory.close()
        until(lambda: "given-back" not in maps(pool.pids[0]), 2)


@pytest.mark.slow
def test_a_dropped_pool_ends_its_workers(two: MemoryFile) -> None:
    pool = WorkerPool(1)
    pool.fill(two.array, 1).wait()
    pid = pool.pids[0]
    del pool
    until(lambda: not alive(pid), 5)


def test_a_forked_child_leaves_the_pool_alone(two: MemoryFile) -> None:
    with WorkerPool(1) as pool:
        wait_until_working(pool)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                pool.fill(two.array, 8)
            except ForkError:
                pool.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        pool.fill(two.array, 8).wait()
        assert alive(pool.pids[0]) and pool.verify(two.array, 8).wait() == 0


@pytest.mark.slow
def test_workers_survive_the_thread_that_started_them_and_ctrl_c(two: MemoryFile) -> None:
    pools: list[WorkerPool] = []
    thread = threading.Thread(target=lambda: pools.append(WorkerPool(1)))
    thread.start()
    thread.join()
    with pools[0] as pool:
        pid = pool.pids[0]
        wait_until_working(pool)
        os.kill(pid, signal.SIGINT)
        assert os.getpgid(pid) != os.getpgrp()
        pool.fill(two.array, 1).wait()
        finish_alone(pool.fill(two.array, 2))
        assert pool.pids == [pid]


def test_the_environment_of_a_worker() -> None:
    env = {"PMI_RANK": "1", "PMIX_X": "1", "OMPI_COMM": "1", "HYDRA_A": "1", "HOME": "/h", "OMP_NUM_THREADS": "8"}
    clean = worker_environment(env, ["/a", ""])
    assert clean["HOME"] == "/h" and clean["PYTHONPATH"] == f"/a:{os.getcwd()}"
    assert clean["OMP_NUM_THREADS"] == "1"
    assert not [name for name in clean if name.startswith(("PMI", "OMPI_", "HYDRA"))]


@pytest.mark.slow
def test_idle_workers_cost_little_time_and_memory() -> None:
    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    with WorkerPool(1) as pool:
        wait_until_working(pool)
        pid = pool.pids[0]
        before = ticks(pid)
        time.sleep(2)
        assert ticks(pid) - before <= 3  # of 200
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        # not Rss: how much of LLVM's 150 MB library the kernel maps around a fault is its own affair
        assert int(dict(line.split(":") for line in lines)["Pss"].split()[0]) < 150_000  # KiB


SCRIPT = """
{first}
import os, sys, time
from mooncake_hpc.native import prepare
from mooncake_hpc.core.memory import MemoryFile
from mooncake_hpc.workers.pool import WorkerPool

print("main", flush=True)
memory = MemoryFile(16 << 20)
pool = WorkerPool(2)
pool.touch(memory.array).wait()
job = pool.fill(memory.array, 3)
while not job.done:
    time.sleep(0.01)
assert pool.verify(memory.array, 3).wait() == 0
print("pids", *pool.pids, flush=True)
{last}
"""


def write_script(folder: Path, first: str, last: str) -> Path:
    """A script without a `__main__` guard, beside a module that shadows one of the standard library."""
    (folder / "random.py").write_text("raise SystemExit('imported from the current folder')")
    script = folder / "script.py"
    script.write_text(SCRIPT.format(first=first, last=last))
    return script


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = write_script(tmp_path, "import sys; sys.path.pop(0)", "pool.close()")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["main", "pids"] and done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
def test_under_mpirun(tmp_path: Path, library: str, request: pytest.FixtureRequest) -> None:
    python = sys.executable if library == "mpich" else request.getfixturevalue("openmpi")
    last = "pool.close(); MPI.COMM_WORLD.Barrier(); os.write(1, b'size %d\\n' % MPI.COMM_WORLD.size)"
    script = write_script(tmp_path, "import sys; sys.path.pop(0)\nfrom mpi4py import MPI", last)
    command = [python, "-m", "mooncake_hpc", "launch", "--ranks=2", "--", python, str(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("main") == 2 and done.stdout.count("size 2") == 2


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Also while a fork of the parent lives on and holds the channels open."""
    last = "child = os.fork()\nos.write(1, b'child %d\\n' % child)\ntime.sleep(60)"
    script = write_script(tmp_path, "import sys; sys.path.pop(0)", last)
    parent = subprocess.Popen([sys.executable, script], env=environment(), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    words = [parent.stdout.readline().split() for _ in range(4)]
    pids = [int(pid) for pid in words[1][1:]]
    (child,) = (int(word) for _, word in words[2:] if word != "0")
    assert len(pids) == 2 and all(map(alive, pids))
    parent.kill()
    parent.wait()
    try:
        until(lambda: not any(map(alive, pids)), 3)
        assert alive(child)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()
