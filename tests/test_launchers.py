"""Launchers' command lines as data, host files, cores for ranks; and mpirun over virtual hosts, for real."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.jobs.launchers import binding, hostfile, srun
from mooncake_hpc.jobs.launchers.base import Host, Job
from mooncake_hpc.jobs.launchers.choice import environment, identify
from mooncake_hpc.jobs.launchers.intel import INTEL
from mooncake_hpc.jobs.launchers.mpich import MPICH, NAMING
from mooncake_hpc.jobs.launchers.openmpi import OPENMPI

HERE = Job(2, ["prog", "--x"])
THERE = Job(3, ["prog"], (Host("h0", 2), Host("h1", 2), Host("h2")), ("A", "B"), "/bin/shell", True, True)


def test_mpich() -> None:
    shell = f"sh -c {shlex.quote(NAMING)} rank"
    assert shlex.join(MPICH.command(HERE, "mpirun")) == f"mpirun -n 2 {shell} prog --x"
    assert shlex.join(MPICH.command(THERE, "mpirun")) == (
        f"mpirun -n 3 -launcher ssh -hosts h0:2,h1:1 -launcher-exec /bin/shell -bind-to none {shell} prog"
    )


def test_openmpi() -> None:
    assert shlex.join(OPENMPI.command(HERE, "mpirun")) == "mpirun -n 2 --bind-to none --oversubscribe prog --x"
    assert shlex.join(OPENMPI.command(THERE, "mpirun")) == (
        "mpirun -n 3 --bind-to none --allow-run-as-root --host h0:2,h1:1 "
        "--mca plm_rsh_agent /bin/shell --mca plm_ssh_agent /bin/shell -x A -x B prog"
    )


def test_intel() -> None:
    assert shlex.join(INTEL.command(HERE, "mpirun")) == "mpirun -n 2 prog --x"
    assert shlex.join(INTEL.command(THERE, "mpirun")) == (
        "mpirun -n 3 -bootstrap ssh -hosts h0:2,h1:1 -bootstrap-exec /bin/shell -genv I_MPI_PIN off prog"
    )


def test_srun() -> None:
    assert shlex.join(srun.command(HERE, "pmix", ("--nodes=2",))) == (
        "srun --ntasks=2 --mpi=pmix --kill-on-bad-exit=1 --export=ALL --nodes=2 prog --x"
    )
    with pytest.raises(ConfigError, match="Slurm chooses the hosts"):
        srun.command(THERE, "pmi2")


BATCH = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_CPUS_PER_NODE": "4(x2)",
    "PATH": "/usr/bin:/bin",
}  # fmt: skip
PTY = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_NTASKS": "1"}
INTERACTIVE = {**BATCH, "SLURM_STEP_ID": "4294967290"}  # salloc's shell, with LaunchParameters=use_interactive_step


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (BATCH, "--cpus-per-task=4"),
        ({**BATCH, "SRUN_CPUS_PER_TASK": "2"}, ""),  # srun's own variable says it
        ({**BATCH, "SLURM_NTASKS": "8"}, ""),  # other tasks than the job's
        (INTERACTIVE, "--cpus-per-task=4"),
        (PTY, "--overlap --immediate=60"),
        ({**PTY, "SLURM_JOB_CPUS_PER_NODE": "1"}, "--overlap --immediate=60 --overcommit"),
    ],
)
def test_srun_asks_for_what_the_job_has(env: dict[str, str], words: str) -> None:
    command = srun.command(HERE, "pmi2", (), env)
    assert shlex.join(command) == " ".join(
        filter(None, ["srun --ntasks=2 --mpi=pmi2 --kill-on-bad-exit=1 --export=ALL", words, "prog --x"])
    )


def test_inside_of_a_step(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    path = {"PATH": str(tmp_path)}
    assert [srun.in_step(env) for env in (BATCH, INTERACTIVE, PTY, {}, {"SLURM_STEP_ID": "0"})] == [0, 0, 1, 0, 0]
    inside = srun.environment({**PTY, **path, "SLURM_EXPORT_ENV": "NONE"})
    assert (inside["SLURM_OVERLAP"], inside["SLURM_EXPORT_ENV"]) == ("1", "ALL")
    assert "SLURM_CPU_BIND" not in inside and "SLURM_CPUS_PER_TASK" not in inside
    outside = srun.environment({**BATCH, **path})
    assert "SLURM_OVERLAP" not in outside and outside["SLURM_CPUS_PER_TASK"] == "4"
    srun.check_once(PTY)
    with pytest.raises(ConfigError, match=r"task 3 of a Slurm step.*salloc or of srun --pty"):
        srun.check_once({**PTY, "SLURM_PROCID": "3"})


def test_variables_that_are_left_over_from_slurm(tmp_path: Path) -> None:
    """In a container, say: no srun, so that an mpirun starts ranks here, and must not look for the job's nodes."""
    env = {**PTY, "PATH": str(tmp_path)}
    assert not srun.in_allocation(env)
    assert environment(MPICH, env) == {**MPICH.settings, "PATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({"SLURM_NTASKS": "6", "SLURM_NNODES": "2"}, 6),
        ({"SLURM_NNODES": "3"}, 3),
        ({"SLURM_NNODES": "3", "SLURM_NTASKS_PER_NODE": "2"}, 6),
        ({"SLURM_NTASKS": "x"}, 1),
    ],
)
def test_tasks_of_a_job(env: dict[str, str], count: int) -> None:
    assert srun.tasks(env) == count


@pytest.mark.parametrize(("text", "total"), [("2(x3),1", 7), ("4", 4), ("", 0), ("x(x2)", 0)])
def test_lists_by_node(text: str, total: int) -> None:
    assert srun.per_node_sum(text) == total


@pytest.mark.parametrize(
    "listing",
    [
        "srun: MPI types are...\nsrun: none\nsrun: pmi2\n",
        "MPI plugin types are...\n\tpmix\n\tpmi2\nspecific pmix: pmix_v4",
    ],
)
def test_srun_plugins(listing: str) -> None:
    assert "pmi2" in srun.plugins(listing)


@pytest.mark.parametrize(
    ("text", "launcher"),
    [
        ("HYDRA build details:\n    Version: 5.0.2", MPICH),
        ("MPICH Version:      5.0.2", MPICH),
        ("mpirun (Open MPI) 5.0.11", OPENMPI),
        ("mpirun (PRRTE) 3.0.11", OPENMPI),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005", INTEL),
    ],
)
def test_identify(text: str, launcher: object) -> None:
    assert identify(text, "mpirun") is launcher


def test_an_unknown_mpi_is_shown() -> None:
    with pytest.raises(ConfigError, match=r"/opt/mpirun is of none .*intel, mpich, openmpi.*Platform MPI"):
        identify("Platform MPI 9", "/opt/mpirun")


def test_the_users_settings_win() -> None:
    assert environment(OPENMPI, {"OMPI_MCA_btl": "tcp,self"})["OMPI_MCA_btl"] == "tcp,self"
    assert environment(OPENMPI, {})["OMPI_MCA_pml"] == "ob1"


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("ch4:ucx ofi", {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}),
        ("ch4:ofi,ucx", {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}),
        ("ch4:ucx", {}),  # it has nothing else
        ("ch3:nemesis", {}),
    ],
)
def test_mpich_in_slurm(device: str, settings: dict[str, str]) -> None:
    assert MPICH.slurm_settings(f"MPICH Version: 5.0.2\nMPICH Device:       {device}\nMPICH CC: cc") == settings


def test_host_files() -> None:
    text = "# nodes\nh0:2\nh1 slots=3 max-slots=4\nh2 # slow\n\nh0\n"
    assert hostfile.parse(text) == (Host("h0", 3), Host("h1", 3), Host("h2", 1))


@pytest.mark.parametrize("line", ["h0:", "h0 2", "h0:0", "h0 slots=x", "-x", "h0;rm"])
def test_bad_host_files(line: str) -> None:
    with pytest.raises(ConfigError, match=r"nodes\.txt, line 2"):
        hostfile.parse(f"h1\n{line}\n", "nodes.txt")
    with pytest.raises(ConfigError, match="names no host"):
        hostfile.parse("# nothing\n")


def test_too_few_slots() -> None:
    with pytest.raises(ConfigError, match="3 ranks, but the 1 hosts have 2 slots"):
        Job(3, ["prog"], (Host("h0", 2),))


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2)),
        ({"MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "4"}, (0, 4)),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, (1, 2)),
        ({}, (0, 1)),
    ],
)
def test_local_ranks(env: dict[str, str], expected: tuple[int, int]) -> None:
    assert binding.local_rank(env) == expected


def test_cores_beside_a_nic(tmp_path: Path) -> None:
    for kind, name, cpus in (("infiniband", "mlx5_0", "4-7,12-15"), ("net", "eth7", "0,2\n")):
        folder = tmp_path / kind / name / "device"
        folder.mkdir(parents=True)
        (folder / "local_cpulist").write_text(cpus)
    assert binding.cpus_beside("mlx5_0", tmp_path) == [4, 5, 6, 7, 12, 13, 14, 15]
    assert binding.cpus_beside("any", tmp_path) == binding.cpus_beside("mlx5_0", tmp_path)
    assert binding.cpus_beside("eth7", tmp_path) == [0, 2]
    assert binding.cpus_beside("nobody", tmp_path) == []


def test_shares_are_apart_and_beside_the_nic() -> None:
    shares = [binding.share(range(16), range(8), rank, 3) for rank in range(3)]
    assert shares == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert [binding.share(range(4), [2, 3], rank, 4) for rank in range(4)] == [[0], [1], [2], [3]]
    assert binding.share(range(2), [0], 0, 3) == [0, 1]  # more ranks than cores: nobody is bound


@pytest.fixture
def three_hosts(tmp_path: Path) -> Iterator[tuple[list[str], Path]]:
    """Words that run a command on one of three virtual hosts, and a host file of all."""
    script = str(ROOT / "launch" / "virtual-hosts")
    name = f"launchers-{os.getpid()}"
    os.environ["VIRTUAL_HOSTS"] = name
    try:
        subprocess.run([script, "up", "3", "1gbit"], check=True, timeout=110)
        file = tmp_path / "hosts.txt"
        file.write_text("h0:2\nh1\nh2\n")
        yield [script, "run", "h0", "--"], file
    finally:
        subprocess.run([script, "down"], check=True, timeout=60)
        del os.environ["VIRTUAL_HOSTS"]


@pytest.fixture(params=["mpich", "openmpi"])
def python(request: pytest.FixtureRequest, openmpi: str) -> str:
    """A Python of each MPI library."""
    return sys.executable if request.param == "mpich" else openmpi


PLACE = """
from mpi4py import MPI
import os, socket
size, cores = MPI.COMM_WORLD.Get_size(), len(os.sched_getaffinity(0))
shown = 0  # command lines of the launcher and its helpers that show the password
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        shown += os.environb[b"MOONCAKE_HPC_ETCD_PASSWORD"] in open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        pass
words = size, socket.gethostname(), cores, os.environ["MOONCAKE_HPC_LEASE_TTL"], shown
os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece: ranks share the pipe
"""


@pytest.mark.slow
def test_a_host_file_for_real(three_hosts: tuple[list[str], Path], python: str) -> None:
    on_h0, file = three_hosts
    launch = [python, "-m", "mooncake_hpc", "launch", f"--hostfile={file}", "--bind=any"]
    shell = f"--remote_shell={ROOT}/launch/virtual-shell"
    variables = {"MOONCAKE_HPC_LEASE_TTL": "7", "MOONCAKE_HPC_ETCD_PASSWORD": "marker 'x\"5"}
    result = subprocess.run(
        [*on_h0, *launch, shell, "--", python, "-c", PLACE],
        env=clean_env(**variables, VIRTUAL_HOSTS=os.environ["VIRTUAL_HOSTS"]),
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 0, result
    cores = len(os.sched_getaffinity(0))
    both = max(1, cores // 2) if cores > 1 else cores
    lines = sorted(result.stdout.split("\n"))[1:]
    assert lines == [f"4 h0 {both} 7 0", f"4 h0 {both} 7 0", f"4 h1 {cores} 7 0", f"4 h2 {cores} 7 0"], result


@pytest.mark.slow
def test_a_bench_over_hosts(three_hosts: tuple[list[str], Path], python: str) -> None:
    on_h0, file = three_hosts
    launch = [python, "-m", "mooncake_hpc", "launch", f"--hostfile={file}", "--ranks=4"]
    flags = ["--protocol=tcp", "--metadata_server=embedded", "--pattern=all_to_all", "--verify", "--block_size=4096"]
    flags += ["--batch_size=16", "--threads=2", "--buffer_size=1048576", "--duration=0.5"]
    result = subprocess.run(
        [*on_h0, *launch, f"--remote_shell={ROOT}/launch/virtual-shell", "--", "bench", *flags],
        env=clean_env(VIRTUAL_HOSTS=os.environ["VIRTUAL_HOSTS"]), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 0, result
    assert "h2:12348 -> h0:12345 h0:12346 h1:12347" in result.stdout, result.stdout
    assert result.stdout.splitlines()[-1].startswith("Test completed: duration"), result.stdout


def test_dry_run_and_mistakes() -> None:
    def launch(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mooncake_hpc", "launch", *words]
        return subprocess.run(command, env=clean_env(), capture_output=True, text=True, timeout=60)

    bench = ["bench", "--pattern=matrix", "--metadata_server=embedded"]
    assert shlex.split(launch("--ranks=3", "--dry_run", "--", *bench).stdout)[-4:] == ["mooncake_hpc", *bench]
    assert launch("--ranks=3").returncode == 2 and "nothing to run" in launch("--ranks=3").stderr
    assert "cannot be read" in launch("--hostfile=/nowhere", "--", "bench").stderr
