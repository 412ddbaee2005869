"""The scripts of slurm/ as they stand, submitted to a real Slurm: states, exit codes, results, nothing left."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from sandbox import QUICK, SCRIPT, Sandbox, SiteEtcd, Watch

from mooncake_hpc.transports.rdma import topology

ETCD = "/usr/bin/etcd"  # the distribution's, fit for several members
pytestmark = pytest.mark.usefixtures("clean")


def test_bench(slurm: Sandbox, tmp_path: Path) -> None:
    """Kernels are compiled before ranks start, on a disk of the node: ranks add nothing to the cache."""
    number = slurm.submit("bench.sbatch", *QUICK, "--verify", folder=tmp_path)
    slurm.wait_for(number, "metadata at")
    compiled = slurm.compiled()
    (job,) = slurm.wait(number, 60)
    assert slurm.compiled() == compiled != set()
    assert (job.state, job.code) == ("COMPLETED", "0:0"), job
    (result,) = job.results
    (initiator,) = result["initiators"]
    assert (initiator["host"], initiator["targets"]) == ("h1", ["h0:12345"]), result
    assert result["transports"] == ["tcp"] and result["wrong_bytes"] == 0 < result["compared_bytes"], result
    assert sum(line.startswith("Test completed") for line in job.output.splitlines()) == 1, job


def test_bench_under_open_mpi(slurm: Sandbox, tmp_path: Path, openmpi: str) -> None:
    """The launcher is chosen by the library of the Python that is named: srun --mpi=pmix."""
    number = slurm.submit("bench.sbatch", *QUICK, "--duration=3", folder=tmp_path, env={"MOONCAKE_HPC_PYTHON": openmpi})
    slurm.wait_for(number, "connected and warm")
    assert any("srun" in line and "--mpi=pmix" in line for _, _, line in slurm.processes())
    (job,) = slurm.wait(number, 60)
    assert (job.state, job.code, len(job.results)) == ("COMPLETED", "0:0", 1), job


def test_a_world_of_another_size_is_refused(slurm: Sandbox) -> None:
    """Ranks that srun did not tell of one another, as with the wrong --mpi: each would be a world of its own."""
    bench = [sys.executable, "-m", "mooncake_hpc", "bench", *QUICK, "--metadata_server=embedded"]
    result = subprocess.run(
        [SCRIPT, "run", "srun", "-N2", "-n2", "--mpi=none", *bench],
        env=slurm.env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode != 0 and "started 2 processes" in result.stderr and "do not match" in result.stderr, result


def test_all_to_all(slurm: Sandbox, tmp_path: Path) -> None:
    job = slurm.run("all-to-all.sbatch", *QUICK, folder=tmp_path)
    assert (job.state, job.code) == ("COMPLETED", "0:0"), job
    (result,) = job.results
    assert [row["host"] for row in result["initiators"]] == ["h0", "h1", "h2", "h3"], result
    assert all(len(row["targets"]) == 3 for row in result["initiators"]), result


def test_an_array_of_block_sizes(slurm: Sandbox, tmp_path: Path, site_etcd: SiteEtcd) -> None:
    """Two tasks run at once under the names of their own jobs, in one etcd."""
    array = slurm.submit(
        "block-sizes.sbatch", "--protocol=tcp", "--duration=0.5", folder=tmp_path, options=["--array=0,3"],
        env={"ETCD_ENDPOINTS": site_etcd.endpoint},
    )  # fmt: skip
    jobs = slurm.wait(array, 120)
    assert {(job.name, job.state, job.code) for job in jobs} == {
        (f"{array}_0", "COMPLETED", "0:0"), (f"{array}_3", "COMPLETED", "0:0"),
    }, [str(job) for job in jobs]  # fmt: skip
    sizes = {job.name: [result["config"]["block_size"] for result in job.results] for job in jobs}
    assert sizes == {f"{array}_0": [4096], f"{array}_3": [262144]}
    assert all(f"metadata at etcd://{site_etcd.endpoint}" in job.output for job in jobs)


def test_two_jobs_at_once_do_not_meet(slurm: Sandbox, tmp_path: Path, site_etcd: SiteEtcd) -> None:
    """Both use the same names of segments in one etcd, and last so long that they overlap."""
    folders = [tmp_path / "a", tmp_path / "b"]
    numbers = [
        slurm.submit("bench.sbatch", *QUICK, "--duration=6", folder=folder, env={"ETCD_ENDPOINTS": site_etcd.endpoint})
        for folder in folders
    ]
    for number in numbers:
        slurm.wait_for(number, "connected and warm")
    assert [slurm.jobs(number)[0].state for number in numbers] == ["RUNNING", "RUNNING"]
    jobs = [slurm.wait(number, 60)[0] for number in numbers]
    assert [(job.state, len(job.results)) for job in jobs] == [("COMPLETED", 1)] * 2, [str(job) for job in jobs]
    assert [len(list(folder.glob("*.json"))) for folder in folders] == [1, 1]


def test_matrix(slurm: Sandbox, tmp_path: Path) -> None:
    job = slurm.run("matrix.sbatch", *QUICK, "--duration=0.1", "--at_once", folder=tmp_path)
    assert (job.state, job.code) == ("COMPLETED", "0:0"), job
    (result,) = job.results
    assert [rank["host"] for rank in result["ranks"]] == ["h0", "h1", "h2", "h3"]
    rates = [[rate is None or rate > 0 for rate in row] for row in result["bytes_per_second"]]
    assert rates == [[True] * 4] * 4 and len(result["pairs"]) == 12, result
    assert "Matrix completed: 12 pairs, 0 wrong bytes" in job.output, job


def test_fan_out(slurm: Sandbox, tmp_path: Path) -> None:
    job = slurm.run("fan-out.sbatch", "--protocol=tcp", "--file_size_mb=8", folder=tmp_path)
    assert (job.state, job.code) == ("COMPLETED", "0:0"), job
    (result,) = job.results
    assert (result["readers"], result["size"], result["wrong"]) == (3, 8 << 20, 0), result
    assert "ALL DONE" in job.output, job


def test_heterogeneous(slurm: Sandbox, tmp_path: Path, clean: Watch) -> None:
    """Components of one trainer and three inferencers, without a common MPI world."""
    number = slurm.submit("heterogeneous.sbatch", "--protocol=tcp", "--file_size_mb=8", folder=tmp_path)
    components = slurm.wait(number, 90)
    assert [(job.state, job.code) for job in components] == [("COMPLETED", "0:0")] * 2, [str(job) for job in components]
    results = components[0].results
    assert sorted(result["host"] for result in results) == ["h1", "h2", "h3"], results
    assert {(result["size"], result["wrong"]) for result in results} == {(8 << 20, 0)}
    assert [file.name for file in tmp_path.glob("*.json*")] == [f"heterogeneous-{number}.json"]
    assert components[0].output.count("ALL DONE") == 3, components[0]
    assert len(clean.secrets) == 1  # etcd's password, which is nowhere to be seen


def test_pytest_mpi(slurm: Sandbox, tmp_path: Path) -> None:
    job = slurm.run("pytest-mpi.sbatch", folder=tmp_path, env={"MOONCAKE_HPC_TEST_PROTOCOL": "tcp"})
    assert (job.state, job.code) == ("COMPLETED", "0:0"), job
    assert job.results == [{"passed": 8, "failed": 0, "skipped": 0, "failures": []}], job


@pytest.mark.skipif(bool(topology.devices()), reason="hardware: this machine has RDMA devices")
def test_pytest_mpi_without_rdma(slurm: Sandbox, tmp_path: Path) -> None:
    job = slurm.run("pytest-mpi.sbatch", folder=tmp_path)
    assert (job.state, job.code, job.results) == ("FAILED", "1:0", []), job
    assert all(f"no usable RDMA device on {node} " in job.output for node in ("h0", "h1")), job
    assert "launch/soft-roce up" in job.output, job


def test_three_members_of_etcd(slurm: Sandbox, tmp_path: Path) -> None:
    job = slurm.run("all-to-all.sbatch", "--etcd-members=3", *QUICK, folder=tmp_path, env={"ETCD_BIN": ETCD})
    assert (job.state, job.code, len(job.results)) == ("COMPLETED", "0:0", 1), job
    assert job.output.count("10.77.0.", job.output.index("etcd://"), job.output.index(", result in")) == 3, job


def test_an_etcd_unfit_for_several_members_is_refused(slurm: Sandbox, tmp_path: Path) -> None:
    """The etcd beside the test's Python is 3.5.1."""
    job = slurm.run("all-to-all.sbatch", "--etcd-members=3", *QUICK, folder=tmp_path)
    assert (job.state, job.results) == ("FAILED", []), job
    assert "can lose data with several members: install 3.4.22, 3.5.6 or later" in job.output, job


def test_mistakes_are_told(slurm: Sandbox, tmp_path: Path) -> None:
    job = slurm.run("bench.sbatch", "--etcd-members=2", folder=tmp_path)
    assert (job.state, job.code) == ("FAILED", "2:0") and "one member or three" in job.output, job
    job = slurm.run("bench.sbatch", folder=tmp_path, env={"MOONCAKE_HPC_PYTHON": "/usr/bin/python3"})
    assert job.state == "FAILED" and "/usr/bin/python3 has no mooncake_hpc" in job.output, job


@pytest.mark.parametrize("script", ["bench.sbatch", "heterogeneous.sbatch"])
def test_a_mistyped_flag_is_told_before_anything_starts(slurm: Sandbox, tmp_path: Path, script: str) -> None:
    number = slurm.submit(script, "--protocl=tcp", folder=tmp_path)
    job = slurm.wait(number, 60)[0]
    assert (job.state, job.code, job.results) == ("FAILED", "2:0", []), job
    assert job.output.count("unknown flag --protocl; did you mean --protocol") == 1 == len(job.output.splitlines()), job


def test_a_newcomers_commands(slurm: Sandbox, tmp_path: Path) -> None:
    """Those that slurm/README.md shows for the sandbox, from a folder that looks like a checkout."""
    for name in ("launch", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = (ROOT / "slurm" / "README.md").read_text()
    commands = re.findall(r"^launch/slurm-sandbox run .*$", text, re.MULTILINE)
    assert len(commands) == 2
    outputs = [
        subprocess.run(
            ["bash", "-c", c], cwd=tmp_path, env=slurm.env, capture_output=True, text=True, timeout=90
        ).stdout
        for c in commands
    ]
    assert "Test completed: duration 3" in outputs[0] and "ALL DONE" in outputs[1], outputs
    assert {file.name.partition("-")[0] for file in tmp_path.glob("*.json")} == {"bench", "fan"}


def test_every_script_is_here() -> None:
    """A script of slurm/ that no test submits is a hole."""
    text = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert [file.name for file in (ROOT / "slurm").glob("*.sbatch") if f'"{file.name}"' not in text] == []
