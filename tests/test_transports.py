"""Both transports pass the one conformance suite; below it, what only one of them can be asked."""

from __future__ import annotations

from mooncake_hpc.testing.transports import TransportConformance


class TestTcp(TransportConformance):
    protocol = "tcp"


class TestShm(TransportConformance):
    protocol = "shm"
    private = False
