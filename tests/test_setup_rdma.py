"""Which pyverbs launch/setup-rdma chooses, by the libibverbs and the Python at hand: all that it asks is made up."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

# pyverbs can be imported once there is a file that says so; pip says what it was asked for
PYTHON = """#!/bin/sh
case "$*" in
    *"import pyverbs"*) [ -e {folder}/works ] && echo pyverbs works; exit ;;
    *platlib*) echo {folder}/site ;;
    *'"include"'*) echo {folder}/include ;;
    *"-m pip"*) echo "$*" >>{folder}/pip; touch {folder}/{makes} ;;
    *version_info*) echo {version} ;;
    *) exec {python} "$@" ;;
esac
"""
LDCONFIG = "#!/bin/sh\necho '	libibverbs.so.1 (libc6,x86-64) => {folder}/lib/libibverbs.so.1'\n"


def script(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def set_up(folder: Path, abi: int, version: str = "3.12", makes: str = "works") -> subprocess.CompletedProcess[str]:
    """Run it where libibverbs is of that private ABI and Python of that version, which Debian's module does not fit."""
    values = {"folder": folder, "python": sys.executable, "version": version, "makes": makes}
    script(folder / "venv" / "bin" / "python", PYTHON.format(**values))
    script(folder / "bin" / "ldconfig", LDCONFIG.format(**values))
    script(folder / "bin" / "apt-get", "#!/bin/sh\n")
    for name in ("site/x", "include/Python.h", "lib/libibverbs/x", "numba/warm-python.done"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "lib" / "libibverbs.so.1").write_bytes(b"\0ibv_x\0IBVERBS_1.1\0IBVERBS_PRIVATE_%d\0" % abi)
    project = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()[:16]
    (folder / "venv" / ".mooncake-stamp").write_text(f"{project} mpich {ROOT}\n")
    env = clean_env(
        PATH=f"{folder / 'bin'}:{os.environ['PATH']}", NUMBA_CACHE_DIR=str(folder / "numba"),
        MOONCAKE_HPC_VENV=str(folder / "venv"),
    )  # fmt: skip
    return subprocess.run(["launch/setup-rdma"], cwd=ROOT, env=env, text=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(("abi", "version"), [(34, "56.1rc0"), (57, "57.0"), (59, "59.0")])
def test_the_version_that_fits_is_built(tmp_path: Path, abi: int, version: str) -> None:
    done = set_up(tmp_path, abi)
    assert done.returncode == 0 and "pyverbs works" in done.stdout, done
    assert f"building pyverbs {version}" in done.stderr
    assert (tmp_path / "pip").read_text() == f"-m pip install --no-binary pyverbs pyverbs=={version} -q\n"


@pytest.mark.parametrize("abi", [64, 65])
def test_else_it_says_which_is_needed(tmp_path: Path, abi: int) -> None:
    done = set_up(tmp_path, abi)
    assert done.returncode == 1 and not (tmp_path / "pip").exists()
    assert f"IBVERBS_PRIVATE_{abi}" in done.stderr and "python3-pyverbs" in done.stderr, done


def test_what_is_there_and_works_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "works").touch()
    done = set_up(tmp_path, 34)
    assert done.returncode == 0 and done.stderr == "" and not (tmp_path / "pip").exists(), done


def test_a_build_that_does_not_load_is_told(tmp_path: Path) -> None:
    done = set_up(tmp_path, 34, makes="nothing")
    assert done.returncode == 1 and "pyverbs 56.1rc0 was built but does not load" in done.stderr, done
