"""Coordination over MPI: values, deadlines, waiting without burning a core. Run under mpirun by launch/test."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.jobs.mpi import Launch, World, detect

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


@pytest.mark.slow
@pytest.mark.mpi(min_size=2)
def test_a_late_rank_is_a_timeout_that_names_it(world: World) -> None:
    last = world.size - 1
    if world.rank == last:
        time.sleep(3.0)
        world.barrier(20, "late")
    elif world.rank == 0:
        with pytest.raises(TimeoutError, match=rf"^rank {last} on .* did not come within 0 s to: a rank that is late"):
            world.barrier(0.2, "a rank that is late")
        time.sleep(4)
        world._comm.Ibcast(bytearray(1), root=0).Wait()  # lets the others go
    else:
        world.barrier(20, "a rank that is late")


@pytest.mark.slow
@pytest.mark.mpi(min_size=2)
def test_ranks_above_0_do_not_wait_for_ever(world: World) -> None:
    if world.rank == 0:
        time.sleep(world._patience + 9)
        world.barrier(10, "late")
    else:
        with pytest.raises(TimeoutError, match=f"all {world.size} ranks: rank 0 that is late"):
            world.barrier(0.2, "rank 0 that is late")


def test_a_communicator_of_the_host_program(world: World) -> None:
    """Two halves, each a world of its own; nothing is initialised again."""
    from mpi4py import MPI

    launch = detect()
    assert launch is not None
    half = MPI.COMM_WORLD.Split(world.rank % 2)
    part = World(launch, half)
    assert part.size == half.Get_size()
    assert part.allgather(world.rank, 20, "halves") == list(range(world.rank % 2, world.size, 2))
    assert not MPI.Is_finalized()


@pytest.mark.slow
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
