"""A forked child that ends by itself takes nothing from its parent, whose devices' files it shares."""

from __future__ import annotations

import pytest
from conftest import clean_env

from mooncake_hpc.testing.fork_server import Nursery

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
def test_a_child_that_ends_by_itself(forked_peers: Nursery) -> None:
    assert forked_peers.run(PROGRAM, env=clean_env(), timeout=140) == "arrived 3\n"
