"""What the kernel holds of RDMA for all processes: a test must leave as much as it found."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator

import pytest


def resources() -> dict[str, int]:
    """How many queue pairs and regions of processes there are, on all devices."""
    shown = subprocess.run(["rdma", "resource", "show"], text=True, capture_output=True, timeout=20, check=True)
    counts: dict[str, int] = {}
    for kind, count in re.findall(r"(qp|mr|pd|cq) (\d+)", shown.stdout):
        counts[kind] = counts.get(kind, 0) + int(count)
    return counts


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = resources()
    yield
    deadline = time.monotonic() + 20
    while (now := resources()) != before:
        assert time.monotonic() < deadline, f"before {before}, now {now}"
        time.sleep(0.2)
