"""launch/soft-roce-vm as a command: what it hands in and out, and its exit status. Two guests are booted."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def guest(*arguments: str, folder: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    if platform.machine() != "x86_64" or not shutil.which("apt-get"):
        pytest.skip("hardware: the guest is for x86_64 and has Debian's kernel")
    command = [str(ROOT / "launch" / "soft-roce-vm"), *arguments]
    return subprocess.run(command, cwd=folder, env=clean_env(**env), text=True, capture_output=True, timeout=390)


def test_a_command_of_several_words(tmp_path: Path) -> None:
    """It is in the same folder, finds as many devices as asked for; what it writes is lost but where it is shared."""
    kept = tmp_path / "kept"
    command = 'ls /sys/class/infiniband; echo "$1" "$GIVEN" >&2; echo 1 >kept/file; echo 1 >lost; exit 3'
    options = ("--nics", "3", "--share", str(kept), "--env", "GIVEN")
    done = guest(*options, "--", "sh", "-c", command, "sh", "two  words", folder=tmp_path, GIVEN="a value")
    assert done.returncode == 3, done
    assert done.stdout == "rxe0\nrxe1\nrxe2\n" and "two  words a value\n" in done.stderr
    assert (kept / "file").exists() and not (tmp_path / "lost").exists()


def test_time_is_up() -> None:
    done = guest("--nics", "1", "--timeout", "2", "--", "sleep", "100")
    assert done.returncode == 124 and "not done after 2 s" in done.stderr, done


def test_no_guest(tmp_path: Path) -> None:
    """A virtual machine that does not come up is tried twice, and its last words are told."""
    machine = tmp_path / "qemu-system-x86_64"
    console = 'for word; do case $word in file:*) echo no luck >"${word#file:}" ;; esac; done'
    machine.write_text(f"#!/bin/sh\n{console}\nexit 1\n")
    machine.chmod(0o755)
    done = guest("--", "true", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 125 and done.stderr.count("no luck") == 2 and "no guest" in done.stderr, done


def test_a_mistyped_option() -> None:
    done = guest("--nic", "2", "--", "true")
    assert done.returncode == 125 and "--nics N" in done.stderr, done
