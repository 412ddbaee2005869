"""Coordination over MPI: values, deadlines, waiting without burning a core. Run under mpirun by launch/test."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from mooncake_hpc.errors import ConfigError
from mooncake_hpc.mpi import Launch, World, detect

pytestmark = pytest.mark.mpi


@pytest.fixture
def world() -> Iterator[World]:
    launch = detect()
    assert launch is not None, "run me under mpirun"
    world = World(launch)
    world.barrier(30, "a test begins")
    yield world
    world.barrier(30, "a test ends")


def test_world_agrees_with_the_launcher(world: World) -> None:
    launch = detect()
    assert launch is not None and (world.rank, world.size) == (launch.rank, launch.size)


def test_collectives(world: World) -> None:
    ranks = list(range(world.size))
    assert world.allgather(world.rank, 10, "ranks") == ranks
    assert world.gather({"rank": world.rank}, 10, "ranks") == ([{"rank": r} for r in ranks] if world.rank == 0 else [])
    assert world.broadcast("hello" if world.rank == 0 else None, 10, "a word") == "hello"
    hosts = world.allgather(world.host, 10, "hosts")
    assert all(host.same(world.host) for host in hosts)


@pytest.mark.mpi(min_size=2)
def test_a_late_rank_is_a_timeout_not_a_hang(world: World) -> None:
    if world.rank == 0:
        time.sleep(1.0)
        world.barrier(10, "late")
    else:
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=f"all {world.size} ranks: a rank that is late"):
            world.barrier(0.2, "a rank that is late")
        assert time.monotonic() - begin < 0.8


@pytest.mark.mpi(min_size=2)
def test_waiting_costs_little_cpu(world: World) -> None:
    if world.rank == 0:
        time.sleep(1.5)
    begin = time.process_time()
    world.barrier(10, "idle")
    assert time.process_time() - begin < 0.3


def test_a_launcher_of_another_library_is_noticed(world: World) -> None:
    with pytest.raises(ConfigError, match=r"started 77 processes.*do not match"):
        World(Launch("some mpirun", world.rank, 77))
