"""Start-up at scale, by benchmarks/startup.py: what a rank asks of etcd does not depend on how many there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_env

AT_START = 10  # messages to etcd that a rank may need until its first transfer
STEADY = {"LeaseKeepAlive"}  # all that it asks for afterwards
PERIOD = 10 / 3  # seconds between two renewals: a third of the lease's time


@pytest.mark.slow
def test_requests_do_not_grow_with_the_ranks(mpirun: str, tmp_path: Path) -> None:
    seconds = 10
    command = [sys.executable, str(ROOT / "benchmarks" / "startup.py"), f"--mpirun={mpirun}", "--ranks=2,8"]
    result = subprocess.run(
        [*command, f"--seconds={seconds}", f"--json={tmp_path / 'figures.json'}"],
        env=clean_env(), capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert result.returncode == 0, result
    few, many = json.loads((tmp_path / "figures.json").read_text())
    assert (few["ranks"], many["ranks"]) == (2, 8)
    # a slow start may have a renewal in it
    asked = [{name: n for name, n in figures["start"].items() if name not in STEADY} for figures in (few, many)]
    assert asked[0] == asked[1] and sum(asked[1].values()) <= AT_START, asked
    for figures in (few, many):
        assert set(figures["steady"]) <= STEADY, figures
        assert all(count * seconds <= seconds / PERIOD + 2 for count in figures["steady"].values()), figures
        assert figures["compiled"] == 0, figures
