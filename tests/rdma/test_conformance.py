"""RDMA passes the suite that tcp and shm pass, in sizes for soft-RoCE, with regions smaller than the memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

import pytest

from mooncake_hpc.core.settings import RdmaSettings, Settings
from mooncake_hpc.testing.transports import TransportConformance

REGION = 9 << 20  # bytes of one memory region at most: what a large registration is split into


@pytest.mark.timeout(300)  # the first test waits for the nursery of peers
@pytest.mark.usefixtures("forked_peers")
class TestRdma(TransportConformance):
    protocol = "rdma"
    settings = Settings(rdma=RdmaSettings(max_mr_size=REGION))
    peer_env: ClassVar[dict[str, str]] = {**os.environ, "MC_MAX_MR_SIZE": str(REGION)}
    arena = 40 << 20
    mixed: Sequence[int] = [1, 2, 3, 7, 63, 64, 65, 4095, 4096, 4097, 65_535, 65_537, 1 << 20, (1 << 22) + 13, 12 << 20]
    large = (20 << 20) + 4097  # over two borders of regions, and more than the device's largest message, 8 MiB
    soon = 30.0
