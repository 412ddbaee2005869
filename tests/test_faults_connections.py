"""Fencing: connections break at random points while the same addresses are rewritten, and no older byte ever lands."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
from cutting import LateProxy, Outsider

from mooncake_hpc import READ, REQUEST, WRITE, TransferEngine
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.testing.link import Link
from mooncake_hpc.testing.peer import PeerProcess

POINTS = 200  # connections broken in a test, each with requests under way
BLOCKS = [64, 4096, 65_536, 300_000, 1 << 20]  # bytes of the requests of a round, six times over
SIZE = 6 * sum(BLOCKS)
LATE = 0.3  # seconds that the proxy keeps bytes back at most: several rounds
HOST = "127.0.0.1"


class Rewriting:
    """Writes the round's number over the same memory, or reads it back, with every round compared."""

    def __init__(self, link: Link, breaker: Outsider | LateProxy) -> None:
        self._link, self._breaker = link, breaker
        self._random = random.Random(20)
        self.broken = 0

    def requests(self, opcode: int) -> npt.NDArray[np.void]:
        at, records = 0, []
        for length in self._random.sample(BLOCKS * 6, 6 * len(BLOCKS)):
            records.append(self._link.request(opcode, at, at, length))
            at += length
        return np.array(records, REQUEST)

    def transfer(self, opcode: int) -> None:
        """One batch, under which the connections break once a random part of it is done."""
        engine = self._link.engine
        self._breaker.prepare()
        moved = sum(engine.lane_bytes().values()) + self._random.uniform(0, 0.9) * SIZE
        batch = engine.submit(self.requests(opcode))

        def break_connections() -> None:
            while not batch.done and sum(engine.lane_bytes().values()) < moved:
                time.sleep(0)
            under_way = not batch.done
            count = self._breaker.cut()
            self.broken += count if under_way else 0

        breaking = threading.Thread(target=break_connections)
        breaking.start()
        batch.wait(30)
        breaking.join()
        assert (batch.status == 1).all()

    def run(self) -> None:
        link, number = self._link, 0
        link.engine.submit(self.requests(WRITE)).wait(30)
        while self.broken < POINTS:
            number = number % 255 + 1
            link.local[:] = number
            self.transfer(WRITE)
            assert link.peer.call("uniform", link.remote) == number
            link.local[:] = 0
            self.transfer(READ)
            assert (link.local == number).all()


@pytest.fixture(params=[1, 3], ids=["1 lane", "3 lanes"])
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(tcp_lanes_per_peer=request.param)


def linked(settings: Settings, endpoint: Callable[[str, int], tuple[str, int]]) -> Iterator[Link]:
    """A pair of processes, of which ours dials what `endpoint` makes of the peer's data port."""
    with (
        PeerProcess("P2PHANDSHAKE", "tcp") as peer,
        TransferEngine("ours:1", "P2PHANDSHAKE", protocol="tcp", bind_address=HOST, settings=settings) as engine,
    ):
        directory = engine._directory
        real = directory.data_endpoint
        directory.data_endpoint = lambda descriptor: endpoint(*real(descriptor))  # type: ignore[method-assign]
        local, remote = engine.allocate(SIZE), peer.call("allocate", SIZE)
        yield Link(engine, peer, engine.open_segment(peer.name), local, remote)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["ours", "peer's"])
def test_connections_reset_from_outside(settings: Settings, side: str, no_leaks: None) -> None:
    for link in linked(settings, lambda host, port: (host, port)):
        pid = os.getpid() if side == "ours" else link.peer.pid
        port = link.segment.endpoint()[1]
        Rewriting(link, Outsider(pid, port)).run()


@pytest.mark.slow
def test_bytes_that_arrive_after_their_connection_is_dead(settings: Settings, no_leaks: None) -> None:
    """The retry must not overtake them: they are refused, or have landed before it."""
    proxies: list[LateProxy] = []

    def through_proxy(host: str, port: int) -> tuple[str, int]:
        if not proxies:
            proxies.append(LateProxy(host, port, LATE))
        return HOST, proxies[0].port

    for link in linked(settings, through_proxy):
        with proxies[0]:
            Rewriting(link, proxies[0]).run()
