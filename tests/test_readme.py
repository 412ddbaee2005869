"""What the README shows does what it says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT, clean_env

README = (ROOT / "README.md").read_text()


EXAMPLES = dict(zip(("engine", "p2p"), re.findall(r"```python\n(.*?)```", README, re.DOTALL), strict=True))
PRINTED = {"p2p": "equal: True\n", "engine": "equal: True over shm+tcp\n"}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.slow
def test_the_examples_run(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", EXAMPLES[name]],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_env(),
        check=False,
    )
    assert result.returncode == 0, result
    assert result.stdout == PRINTED[name]


def test_it_is_short() -> None:
    assert README.count("\n") <= 120
    paragraphs = re.split(r"\n\n|\n- |\n\|", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    assert max(len(paragraph.split()) for paragraph in paragraphs) <= 60


def test_files_that_it_names_exist() -> None:
    named = re.findall(r"\b((?:launch|slurm|benchmarks|examples|tests)/[\w./-]*\w)", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing


def test_every_variable_is_explained() -> None:
    ours = r"(?:MC|MOONCAKE_HPC|NCCL|ETCD)_[A-Z0-9_]*[A-Z0-9]"  # others are told of where they matter
    read = set(re.findall(rf"\b{ours}", (ROOT / "mooncake_hpc/core/settings.py").read_text()))
    told = set(re.findall(rf"`({ours})`", (ROOT / "docs/variables.md").read_text()))
    assert len(read) > 40 and told == read
