"""`locked` of launch/_common.sh: one process at a time, with flock(2) and without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

SCRIPT = """
source launch/_common.sh
work() { mkdir "$1.busy" || { echo both; return; }; sleep 0.2; rmdir "$1.busy"; echo done; }
for i in 1 2 3; do locked "$1" 20 work "$1" & done
wait
"""
NO_FLOCK = [sys.executable, "tests/no_flock.py"]


def bash(script: str, *arguments: object, before: list[str]) -> subprocess.CompletedProcess[str]:
    command = [*before, "bash", "-c", script, "lock", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("before", [[], NO_FLOCK], ids=["flock", "no flock"])
def test_one_at_a_time_and_nothing_is_left(tmp_path: Path, before: list[str]) -> None:
    run = bash(SCRIPT, tmp_path / "lock", before=before)
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n" * 3, "")
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


def test_without_flock_the_link_of_a_process_that_has_ended_is_removed(tmp_path: Path) -> None:
    killed = bash('source launch/_common.sh; locked "$1" 5 bash -c "kill -9 \\$PPID"', tmp_path / "l", before=NO_FLOCK)
    assert killed.returncode and (tmp_path / "l.owner").is_symlink()
    run = bash('source launch/_common.sh; locked "$1" 5 echo mine', tmp_path / "l", before=NO_FLOCK)
    assert (run.stdout, run.stderr) == ("mine\n", "")


def test_without_flock_another_machines_process_is_waited_for_and_named(tmp_path: Path) -> None:
    (tmp_path / "l.owner").symlink_to("another-boot:77:5:node9")
    run = bash('source launch/_common.sh; locked "$1" 1 echo mine', tmp_path / "l", before=NO_FLOCK)
    assert run.returncode == 1 and run.stdout == ""
    assert "process 77 of host node9" in run.stderr and f"remove {tmp_path}/l.owner" in run.stderr
