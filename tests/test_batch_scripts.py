"""How a batch script finds the _job.sh of its own checkout, over what Slurm 22.05 prints; and the scripts' form."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

pytestmark = pytest.mark.slow

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
MARK = "# mooncake_hpc batch jobs, version 1\n"
# `scontrol show job`, with what stands around the command
RECORD = """JobId=7 {array}JobName={name}
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Partition=all AllocNode:Sid=hub:20322
   OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null)
   Command={command}
   {after}WorkDir={work}
   StdErr=/tmp/site/out1
   StdOut=/tmp/site/out1
   Power=

"""
ODD = [
    "my project",
    "a=b",
    'it\'s "so"',
    "new\nline",
    "$(touch x)`y`",
    "Command=x",
    "-dash",
    "a\tb",
    "WorkDir=z",
    "*?[a]",
]


def checkout(folder: Path) -> Path:
    """Scripts whose _job.sh only says where it is."""
    (folder / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / "slurm" / "bench.sbatch", folder / "slurm")
    (folder / "slurm" / "_job.sh").write_text(MARK + 'printf "sourced %s" "${BASH_SOURCE[0]}"; exit 0\n')
    (folder / "slurm").chmod(0o755)
    (folder / "slurm" / "_job.sh").chmod(0o644)
    return folder / "slurm" / "bench.sbatch"


def run(
    tmp_path: Path, script: Path, *arguments: str, command: str | None = None, name: str = "bench", after: str = "",
    array: str = "", copies: int = 1,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run what Slurm makes of the script: a copy in its spool folder. `command` is how sbatch was called."""
    submitted = " ".join([str(script) if command is None else command, *arguments])
    record = RECORD.format(command=submitted, work=tmp_path, name=name, after=after, array=array)
    spool = tmp_path / "spool"
    spool.mkdir(exist_ok=True)
    shutil.copy(script, spool / "slurm_script")
    (spool / "record").write_text(record * copies)
    (spool / "scontrol").write_text(f'#!/bin/sh\n[ "$*" = "show job 7" ] && cat {str(spool)!r}/record\n')
    (spool / "scontrol").chmod(0o755)
    env = clean_env(SLURM_JOB_ID="7", SLURM_JOB_NAME=name, SLURM_SUBMIT_DIR=str(tmp_path))
    env["PATH"] = f"{spool}:{env['PATH']}"
    command_line = ["bash", str(spool / "slurm_script"), *arguments]
    return subprocess.run(command_line, env=env, cwd="/", capture_output=True, text=True, timeout=30)


def check_refused(result: subprocess.CompletedProcess[str], cause: str) -> None:
    """In one line, and nothing was sourced."""
    assert (result.returncode, result.stdout) == (1, ""), result
    assert cause in result.stderr and len(result.stderr.splitlines()) == 1, result


@pytest.mark.parametrize("folder", ODD)
@pytest.mark.parametrize("arguments", [(), ("--protocol=tcp",), ("a  b", "", "--x=/tmp/y z", "new\n   Line=1")])
def test_a_script_finds_its_own_checkout(tmp_path: Path, folder: str, arguments: tuple[str, ...]) -> None:
    """However its path and arguments look, and whatever lies where a part of the path would lead."""
    for part in (tmp_path, tmp_path / "my", tmp_path / "slurm", tmp_path / "spool"):
        part.mkdir(exist_ok=True)
        (part / "_job.sh").write_text(MARK + "echo planted; exit 0\n")
    script = checkout(tmp_path / folder)
    result = run(tmp_path, script, *arguments)
    assert result.stdout == f"sourced {script.parent / '_job.sh'}", result


@pytest.mark.parametrize("after", ["SubmitLine=sbatch my script\n   ", "Comment=x\n   "])
def test_other_versions_say_more(tmp_path: Path, after: str) -> None:
    script = checkout(tmp_path / "my project")
    result = run(tmp_path, script, "--x", after=after, array="ArrayJobId=7 ArrayTaskId=0 ", copies=3)
    assert result.stdout == f"sourced {script.parent / '_job.sh'}", result


def test_a_path_relative_to_the_submit_folder_and_a_link(tmp_path: Path) -> None:
    script = checkout(tmp_path / "my project")
    result = run(tmp_path, script, "--x", command="my project/slurm/bench.sbatch")
    assert result.stdout == f"sourced {script.parent / '_job.sh'}", result
    (tmp_path / "link").symlink_to(script)
    assert run(tmp_path, script, "--x", command="link").stdout == result.stdout


def test_a_script_that_is_run_by_hand_in_an_allocation(tmp_path: Path) -> None:
    script = checkout(tmp_path / "my project")
    env = clean_env(SLURM_JOB_ID="7")
    result = subprocess.run(["bash", script, "a b"], env=env, capture_output=True, text=True, timeout=30)
    assert result.stdout == f"sourced {script.parent / '_job.sh'}", result


@pytest.mark.parametrize(
    ("command", "cause"),
    [("(null)", "submit by a path"), ("/nowhere/bench.sbatch", "is no file"), ("copy.sbatch", "no _job.sh beside it")],
)
def test_a_script_without_a_checkout_is_refused(tmp_path: Path, command: str, cause: str) -> None:
    """From standard input, gone, or a copy; also where a _job.sh lies in the submit folder."""
    script = checkout(tmp_path / "my project")
    if command != "copy.sbatch":
        (tmp_path / "_job.sh").write_text(MARK + "echo planted; exit 0\n")
    shutil.copy(script, tmp_path / "copy.sbatch")
    check_refused(run(tmp_path, script, command=command), cause)


def test_another_programs_file_is_refused(tmp_path: Path) -> None:
    script = checkout(tmp_path / "my project")
    (script.parent / "_job.sh").write_text("echo another\n")
    check_refused(run(tmp_path, script), "of another version")
    (script.parent / "_job.sh").unlink()
    os.mkfifo(script.parent / "_job.sh")  # reading it would wait for ever
    check_refused(run(tmp_path, script), "no _job.sh")


@pytest.mark.parametrize("which", ["_job.sh", "."])
def test_a_file_that_others_can_change_is_refused(tmp_path: Path, which: str) -> None:
    script = checkout(tmp_path / "my project")
    file = script.parent / which
    file.chmod(file.stat().st_mode | 0o002)
    check_refused(run(tmp_path, script), "others can change")
    if os.getuid() == 0:
        file.chmod(file.stat().st_mode & ~0o002)
        os.chown(file, 12345, 12345)
        check_refused(run(tmp_path, script), "others can change")
        for one in (script, script.parent, script.parent / "_job.sh"):  # another user's checkout, submitted by its path
            os.chown(one, 12345, 12345)
        assert run(tmp_path, script).stdout.startswith("sourced ")


def test_all_scripts_find_it_alike() -> None:
    blocks = [
        re.findall(r"^# ---- the checkout's _job\.sh.*?^# ----$", file.read_text(), re.S | re.M) for file in SCRIPTS
    ]
    assert len(SCRIPTS) == 7 and all(len(found) == 1 and found == blocks[0] for found in blocks)
    assert (ROOT / "slurm" / "_job.sh").read_text().startswith(MARK)


def test_no_script_runs_outside_of_slurm() -> None:
    for script in SCRIPTS:
        result = subprocess.run(["bash", script], env=clean_env(), capture_output=True, text=True, timeout=30)
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result
        assert "runs inside of a Slurm job only" in result.stderr, result
