"""What the README shows does what it says."""

from __future__ import annotations

import re
import subprocess
import sys

from conftest import ROOT, clean_env

README = (ROOT / "README.md").read_text()


def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=120, env=clean_env(), check=False
    )
    assert result.returncode == 0, result
    assert result.stdout == "equal: True over shm+tcp\n"


def test_files_that_it_names_exist() -> None:
    named = re.findall(r"\b((?:launch|slurm|benchmarks|examples|tests)/[\w./-]*\w)", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing
