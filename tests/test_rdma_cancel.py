"""Batches that are cancelled while another thread posts them: no work request reaches the device that the lane forgot.

Over a device that does nothing, so that both threads are in native code nearly all the time.
"""

from __future__ import annotations

import importlib
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fake_fabric
import numpy as np
import pytest

from mooncake_hpc import REQUEST, WRITE, TransferEngine

ROUNDS = 400
REQUESTS, SIZE = 4096, 64


@pytest.fixture
def noop() -> Iterator[Any]:
    """The module, over modules of the package that do without pyverbs."""
    name = "mooncake_hpc.testing.noop"
    with fake_fabric.installed():
        try:
            yield importlib.import_module(name)
        finally:
            sys.modules.pop(name, None)


def test_a_cancelled_batch_posts_nothing_twice(noop: Any) -> None:
    store, delays = "memory://noop-cancel", random.Random(5)
    with (
        noop.installed() as rails,
        TransferEngine("there:1", store, protocol="rdma", bind_address="127.0.0.1") as there,
        TransferEngine("here:1", store, protocol="rdma", bind_address="127.0.0.1") as here,
        ThreadPoolExecutor(1) as other,
    ):
        theirs, ours = there.allocate(REQUESTS * SIZE), here.allocate(REQUESTS * SIZE)
        requests = np.zeros(REQUESTS, REQUEST)
        requests["opcode"], requests["length"] = WRITE, SIZE
        requests["target_id"] = here.open_segment(there.name).id
        requests["local_addr"] = ours.ctypes.data + SIZE * np.arange(REQUESTS)
        requests["remote_addr"] = theirs.ctypes.data + SIZE * np.arange(REQUESTS)
        cut = 0
        for _ in range(ROUNDS):
            batch = here.submit(requests)
            driving = other.submit(batch.join, 10)
            time.sleep(delays.random() * 1e-4)
            batch.cancel()
            assert driving.result(10)
            cut += bool((batch.status < 0).any() and (batch.status > 0).any())
            assert [rail.taken.tolist() for rail in rails] == [rail.posted for rail in rails]
        assert cut > ROUNDS / 20, "hardly a batch was cancelled while it was posted"
