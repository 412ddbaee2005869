"""A rank forks with an engine open. Run under mpirun by launch/test, with each MPI library."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mooncake_hpc import TransferEngine
from mooncake_hpc.core.errors import ForkError
from mooncake_hpc.jobs.mpi import World, detect

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning"),
]
NBYTES = 1 << 18


def read(engine: TransferEngine, name: str, value: int) -> int:
    """How many bytes that rank's memory has of this value."""
    block = engine.allocate(NBYTES)
    segment = engine.open_segment(name)
    engine.read(block, segment, segment.buffers[0].address, 20)
    return int((block == value).sum())


def work(inherited: TransferEngine, world: World, name: str, value: int) -> int:
    """The child's: what is inherited is refused, and a new engine reads."""
    for refused in (lambda: inherited.open_segment(name), lambda: world.barrier(1, "a child")):
        try:
            refused()
        except ForkError:
            continue
        return 3
    inherited.close()
    with TransferEngine("child:1", "P2PHANDSHAKE", protocol="tcp", bind_address="127.0.0.1") as engine:
        return 0 if read(engine, name, value) == NBYTES else 4


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
def test_a_child_has_an_engine_of_its_own(protocol: str) -> None:
    """What it raises below `guarded` is its own matter, and ends no rank."""
    launch = detect()
    assert launch is not None, "run me under mpirun"
    world = World(launch)
    with (
        TransferEngine(f"rank:{world.rank + 1}", "P2PHANDSHAKE", protocol=protocol, bind_address="127.0.0.1") as engine,
        TransferEngine("tcp:1", "P2PHANDSHAKE", protocol="tcp", bind_address="127.0.0.1") as over_tcp,
    ):
        for each in (engine, over_tcp):
            each.allocate(NBYTES)[:] = world.rank + 1
        names = world.allgather((engine.name, over_tcp.name), 20, "names")
        number = (world.rank + 1) % world.size
        value = number + 1
        assert read(engine, names[number][0], value) == NBYTES
        try:
            with world.guarded():
                if (child := os.fork()) == 0:
                    raise ValueError(work(engine, world, names[number][1], value))
        except ValueError as ended:
            os._exit(ended.args[0])
        killer = threading.Timer(60, os.kill, (child, signal.SIGKILL))
        killer.start()
        assert read(engine, names[number][0], value) == NBYTES
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        killer.cancel()
        assert read(engine, names[number][0], value) == NBYTES
        world.barrier(60, "all children have ended")
