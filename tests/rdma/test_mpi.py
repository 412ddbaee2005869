"""The bench's ranks over RDMA: the suite of tests/mpi under mpirun, with rdma in tcp's place."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

pytestmark = pytest.mark.usefixtures("nics")


@pytest.mark.timeout(300)
def test_two_ranks(mpirun: str, tmp_path: Path) -> None:
    """Reads and writes, every byte compared."""
    report = tmp_path / "r.xml"
    ranks = [sys.executable, "-m", "mooncake_hpc", "launch", f"--mpirun={mpirun}", "--ranks=2", "--"]
    tests = [
        "-m",
        "mpi4py",
        "-m",
        "pytest",
        "-q",
        "-x",
        "--with-mpi",
        "--timeout-method=thread",
        "--junitxml",
        str(report),
    ]
    chosen = ["tests/mpi/test_ranks.py", "-k", "pairs"]  # more of them in test_slurm.py
    done = subprocess.run(
        [*ranks, str(ROOT / "launch" / "_rank.sh"), str(tmp_path), sys.executable, *tests, *chosen],
        cwd=ROOT, env=clean_env(MOONCAKE_HPC_TEST_PROTOCOL="rdma"), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    cases = list(xml.parse(report).iter("testcase"))
    assert len(cases) == 2 and all(case.find("skipped") is None for case in cases), done.stdout[-2000:]
