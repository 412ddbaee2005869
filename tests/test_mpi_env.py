"""Launchers recognised by their environment; addresses shared by the ranks of a job."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT, clean_env

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.jobs.hosts import Host, shared_address
from mooncake_hpc.jobs.mpi import Launch, default_name, detect

HERE = Host.here()


@pytest.mark.parametrize(
    ("env", "rank", "size"),
    [
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "6"}, 3, 4),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}, 1, 2),
        ({"PMIX_RANK": "5", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}, 5, 8),
        ({"PMIX_RANK": "2"}, 2, 0),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, 1, 2),
        # mpirun of MPICH inside an allocation: its proxies are a Slurm step of their own
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "7", "PMI_SIZE": "8"}, 7, 8),
    ],
)
def test_launchers(env: dict[str, str], rank: int, size: int) -> None:
    launch = detect(env)
    assert launch is not None and (launch.rank, launch.size) == (rank, size)


@pytest.mark.parametrize(
    "env",
    [
        {},
        # a batch script is no step, though Slurm gives it a rank
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},
    ],
)
def test_no_launcher(env: dict[str, str]) -> None:
    assert detect(env) is None


def test_default_names() -> None:
    assert default_name(None, "node1") == "node1"
    assert default_name(Launch("x", 3, 4), "node1") == "node1:12348"


def test_one_host_shares_loopback() -> None:
    assert shared_address([HERE, Host.here()], "10.0.0.1") == "127.0.0.1"


def test_other_hosts_are_reached_over_the_routed_address() -> None:
    if not HERE.addresses:
        pytest.skip("hardware: no address but loopback")
    other = Host("elsewhere", "another-boot", "net:[1]", HERE.addresses[:1])
    assert shared_address([HERE, other]) == HERE.addresses[0]
    assert shared_address([HERE, other], "10.9.9.9") == "10.9.9.9"


def test_a_container_of_the_same_machine_is_another_host() -> None:
    container = Host(HERE.name, HERE.boot_id, "net:[1]", ())
    assert not container.same(HERE)
    with pytest.raises(ConfigError, match="MC_TCP_BIND_ADDRESS"):
        shared_address([HERE, container])


def test_detect_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PMI", "OMPI", "SLURM", "MV2")):
            monkeypatch.delenv(name)
    assert detect() is None
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert detect() == Launch("a PMI launcher (MPICH's mpiexec, srun --mpi=pmi2)", 0, 1)


def python(script: str) -> None:
    """Run the script in a process on its own; it fails by an assertion."""
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean_env(), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_mpi_is_needed_where_none_is_used() -> None:
    """Neither for a transfer nor to find out one's rank, as where mpi4py is not installed."""
    python("""if True:
        import sys
        sys.modules["mpi4py"] = None  # an import of it fails
        import numpy as np, mooncake_hpc as mh
        from mooncake_hpc.jobs.mpi import detect
        assert detect({"PMIX_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}).rank == 1
        here = dict(protocol="tcp", bind_address="127.0.0.1")
        with mh.TransferEngine("a:1", "memory://x", **here) as a, mh.TransferEngine("b:1", "memory://x", **here) as b:
            a.allocate(64)[:] = 7
            mine = b.allocate(64)
            segment = b.open_segment("a:1")
            b.read(mine, segment, segment.buffers[0].address)
            assert (mine == 7).all()
    """)


def test_mpi_of_a_host_program_is_used_as_it_is() -> None:
    """With the thread level that it was initialised for; and the host program finalises it."""
    python("""if True:
        import threading
        import mpi4py
        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
        from mooncake_hpc.core.errors import ConfigError
        from mooncake_hpc.jobs.mpi import Launch, World
        refused = []
        def refuse():
            try:
                World(Launch("x", 0, 1))
            except ConfigError as error:
                refused.append(str(error))
        refuse()
        assert "MPI.Init" in refused.pop()
        MPI.Init_thread(MPI.THREAD_FUNNELED)
        thread = threading.Thread(target=refuse)
        thread.start()
        thread.join()
        level = MPI.Query_thread()
        assert bool(refused) == (level < MPI.THREAD_SERIALIZED), (refused, level)
        world = World(Launch("x", 0, 1), MPI.COMM_SELF)
        assert world.allgather("me", 10, "all") == ["me"]
        world.barrier(10, "all")
        del world
        assert not MPI.Is_finalized()
        MPI.Finalize()
    """)
