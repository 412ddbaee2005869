"""A forked child that ends by itself takes nothing from its parent, whose devices' files it shares."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import clean_env

PROGRAM = """
import os, sys
from mooncake_hpc import TransferEngine
with (TransferEngine("a:1", "memory://x", protocol="rdma", bind_address="127.0.0.1") as a,
      TransferEngine("b:1", "memory://x", protocol="rdma", bind_address="127.0.0.1") as b):
    theirs, ours = a.allocate(1 << 20), b.allocate(1 << 20)
    segment = b.open_segment("a:1")
    for number in range(1, 4):
        ours[:] = number
        b.write(ours, segment, theirs.ctypes.data)
        assert (theirs == number).all()
        child = os.fork()
        if child == 0:
            sys.exit(0)  # by way of both close() and of everything's deletion
        assert os.waitpid(child, 0)[1] == 0
print("arrived", theirs[-1])
"""


@pytest.mark.timeout(150)
def test_a_child_that_ends_by_itself(nics: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], text=True, capture_output=True, timeout=140, env=clean_env())
    assert done.stdout == "arrived 3\n", done.stderr
