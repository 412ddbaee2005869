"""What sites and users do differently: odd folders, interactive shells, exported variables, requests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from sandbox import QUICK, SCRIPT, Sandbox, SiteEtcd, Watch, wait_until

ETCD = "/usr/bin/etcd"  # the distribution's, fit for several members
ODD = 'my project=a "b" it\'s\nnew $(x)'
MARK = "# mooncake_hpc batch jobs, version 1\n"
OWN = MARK + "echo own >&2; exit 0\n"
PLANTED = MARK + "echo planted >&2; exit 0\n"
SHOW = """#!/bin/bash
echo "the password is $MOONCAKE_HPC_ETCD_PASSWORD"
exec -a "program --password=$MOONCAKE_HPC_ETCD_PASSWORD" sleep 3
"""
pytestmark = pytest.mark.usefixtures("clean")


def submit(slurm: Sandbox, folder: Path, *words: str, stdin: str = "") -> str:
    """The output of a job that `sbatch WORDS` from `folder` makes, once it has ended."""
    output = folder / "job.out"
    output.unlink(missing_ok=True)
    command = [SCRIPT, "run", "sbatch", "--wait", f"--output={output}", *words]
    env = {**slurm.env, "TMPDIR": str(folder)}
    subprocess.run(command, cwd=folder, env=env, input=stdin, capture_output=True, text=True, timeout=60)
    return output.read_text()


def test_a_checkout_of_any_name(slurm: Sandbox, tmp_path: Path) -> None:
    """A script finds the _job.sh of its own checkout or says that it does not; it never runs another's file."""
    checkout = tmp_path / ODD
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    (checkout / "slurm" / "_job.sh").write_text(OWN)
    for folder in (tmp_path, tmp_path / "my", tmp_path / "slurm"):
        folder.mkdir(exist_ok=True)
        (folder / "_job.sh").write_text(PLANTED)
    script = f"{ODD}/slurm/bench.sbatch"
    try:
        assert submit(slurm, tmp_path, str(tmp_path / script), "--protocol=tcp", "two  words", "") == "own\n"
        assert submit(slurm, tmp_path, "--chdir=/dev/shm", "--export=NONE", script) == "own\n"
        assert submit(slurm, tmp_path, "--array=0", f"./{script}", "x") == "own\n"
        text = submit(slurm, tmp_path, stdin=(tmp_path / script).read_text())
        assert text.startswith("bench: ") and "submit by a path" in text and text.count("\n") == 1, text
    finally:
        shutil.rmtree(checkout)
        for folder in (tmp_path, tmp_path / "my", tmp_path / "slurm"):
            (folder / "_job.sh").unlink()


def test_a_secret_that_is_shown_would_be_seen(slurm: Sandbox, tmp_path: Path, clean: Watch) -> None:
    """What every test here looks for, in a job that shows it on its command line and in its output."""
    script = tmp_path / "job.log"
    script.write_text(SHOW)
    command = [SCRIPT, "run", "sbatch", "--wait", f"--output={tmp_path}/job.out", str(script)]
    env = {**slurm.env, "MOONCAKE_HPC_ETCD_PASSWORD": "a-marker-of-a-test"}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=60)
    clean.look()
    assert clean.secrets == {"a-marker-of-a-test"}
    where = " ".join(sorted(clean.shown))
    assert f"{tmp_path}/job.out" in where and "command line on h0" in where, where
    clean.secrets.clear()
    clean.shown.clear()


def in_a_shell(
    slurm: Sandbox, *options: str, words: tuple[str, ...], kind: str = "srun"
) -> subprocess.CompletedProcess[str]:
    """Run the words as one types them in a shell that Slurm has started."""
    command = [SCRIPT, "run", kind, *options, "bash", "-c", '"$@"', "shell", *words]
    return subprocess.run(command, env=slurm.env, capture_output=True, text=True, timeout=90)


BENCH = ("bench", "--metadata_server=embedded", *QUICK)
LAUNCH = (sys.executable, "-m", "mooncake_hpc", "launch")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("srun", ["-N1", "-n1", "-c2"]),
        ("srun", ["-N1", "-n1", "-c1", "--mem=64", "--mpi=pmi2"]),  # less than the ranks, and all memory taken
        ("salloc", ["-N2", "-n2", "-c2"]),
    ],
    ids=["srun", "one core", "salloc"],
)
def test_ranks_in_an_interactive_shell(slurm: Sandbox, kind: str, options: list[str]) -> None:
    """Its step holds the job's cores, so that a step inside of it has to share them; salloc's shell holds none."""
    result = in_a_shell(slurm, *options, words=(*LAUNCH, "--ranks=2", "--", *BENCH), kind=kind)
    assert result.returncode == 0 and "Test completed: duration" in result.stdout, result


def test_every_task_of_a_step_is_no_launcher(slurm: Sandbox) -> None:
    result = in_a_shell(slurm, "-N2", "-n2", "--kill-on-bad-exit=1", words=(*LAUNCH, "--ranks=2", "--", "sleep", "60"))
    assert result.returncode != 0 and "this is task 1 of a Slurm step" in result.stderr, result


def test_exported_variables_and_requests_of_other_sites(slurm: Sandbox, tmp_path: Path, clean: Watch) -> None:
    """Few variables, among them those that would change srun's output; memory by the core; a name like a path; peers
    that prove to know a secret, which nothing shows."""
    secret = tmp_path / "secret.log"
    secret.touch(0o600)
    secret.write_text("a-secret-of-the-peers\n")
    clean.secrets.add("a-secret-of-the-peers")
    names = "PATH,NUMBA_CACHE_DIR,MOONCAKE_HPC_PYTHON,MOONCAKE_HPC_LOCAL,MOONCAKE_HPC_SECRET_FILE,TMPDIR,"
    names += "ETCD_BIN,SLURM_LABELIO,SLURM_STDOUTMODE"
    options = [f"--export={names}", "--mem-per-cpu=100", "--exclusive", "--job-name=../a b", "--output=a-%j.out"]
    job = slurm.run(
        "all-to-all.sbatch", "--etcd-members=3", *QUICK, folder=tmp_path, options=[*options, "--nodes=3"],
        env={
            "ETCD_BIN": ETCD, "SLURM_LABELIO": "1", "SLURM_STDOUTMODE": "none", "TMPDIR": "/dev/shm",
            "MOONCAKE_HPC_SECRET_FILE": str(secret),
        },
    )  # fmt: skip
    assert (job.state, job.code) == ("COMPLETED", "0:0"), job.output
    assert len(clean.secrets) == 2  # the other one is etcd's password
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".json"] == [f".._a b-{job.name}.json"]


def test_a_job_that_is_queued_again(slurm: Sandbox, tmp_path: Path, site_etcd: SiteEtcd) -> None:
    """Its keys are others than those of its first run, whose processes may be alive on a node that does not answer."""
    env = {"ETCD_ENDPOINTS": site_etcd.endpoint}
    words = [*QUICK, "--duration=30"]
    number = slurm.submit("bench.sbatch", *words, folder=tmp_path, options=["--requeue"], env=env)
    slurm.wait_for(number, "connected and warm")
    before = set(site_etcd.keys())
    slurm("run", "scontrol", "requeue", number)

    def runs_again() -> bool:
        (job,) = slurm.jobs(number)
        if job.state == "PENDING":  # else for two minutes
            slurm("run", "scontrol", "update", f"jobid={number}", "StartTime=now")
        return job.state == "RUNNING" and job.fields["Restarts"] == "1" and "connected and warm" in job.output

    wait_until(runs_again, 60, lambda: str(slurm.jobs(number)[0]))
    assert before and all(key.startswith(f"mooncake/slurm-{number}/") for key in before), before
    after = site_etcd.keys()
    assert any(key.startswith(f"mooncake/slurm-{number}-run2/") for key in after), after
    slurm("run", "scancel", number)
    (job,) = slurm.wait(number, 20)
    assert job.state == "CANCELLED", job
