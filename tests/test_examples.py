"""The programs of examples/ run under mpirun, say that their bytes are right, and fit on a screen."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT, clean_env

SCREEN = 50  # lines
EXAMPLES = {
    "exchange.py": (3, "3 ranks read 4194304 bytes each over shm+tcp: correct = True"),
    "kv_cache.py": (2, "80 blocks of 32768 bytes over shm+tcp: correct = True"),
    "checkpoint.py": (3, "equal on all ranks: True"),
}


def test_all_are_here_and_short() -> None:
    files = sorted((ROOT / "examples").glob("*.py"))
    assert [file.name for file in files] == sorted(EXAMPLES)
    assert all(len(file.read_text().splitlines()) <= SCREEN for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs(name: str, library: str, request: pytest.FixtureRequest) -> None:
    """They use mpi4py before us, and have no `if __name__ == "__main__"`."""
    python = sys.executable if library == "mpich" else request.getfixturevalue("openmpi")
    ranks, words = EXAMPLES[name]
    result = subprocess.run(
        [python, "-m", "mooncake_hpc", "launch", f"--ranks={ranks}", "--", python, str(ROOT / "examples" / name)],
        env=clean_env(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0 and words in result.stdout and not result.stderr, result
