"""RDMA nodes killed by SIGKILL at random points while the same addresses are rewritten with the round's number.

`tests/test_rdma_breaks.py` breaks connections so, on devices of software.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from rdma_resources import nothing_is_left as nothing_is_left

from mooncake_hpc import READ, WRITE, TransferEngine
from mooncake_hpc.core.errors import PeerLost
from mooncake_hpc.testing.link import HOST, Link, requests
from mooncake_hpc.testing.peer import PeerProcess

pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("forked_peers")]

SIZE = 128 << 10
POINTS = 200
TOGETHER = 20  # victims at a time: most of a point is the wait for a device to give a dead peer up
RPC_PORT = 17800  # of the first victim
ARRIVAL_TIMEOUT = 60.0  # seconds
SPAN = 0.08  # seconds, in which a few transfers of each direction begin and end
LATER = 0.05  # seconds in which whatever still is under way would land


def two_devices(metadata: str, nics: list[str]) -> TransferEngine:
    return TransferEngine("ours:1", metadata, protocol="rdma", bind_address=HOST, device_name=",".join(nics[:2]))


def on_two(nics: list[str], **variables: str) -> dict[str, str]:
    """A peer's environment."""
    return {**os.environ, "MC_TE_FILTERS": ",".join(nics[:2]), **variables}


def test_a_killed_target_is_replaced_under_its_name_at_once(etcd: str, nics: list[str]) -> None:
    """What was under way ends with an error, and afterwards touches no memory of ours."""
    size = 4 << 20
    with two_devices(etcd, nics) as ours:
        local, chooser, name = ours.allocate(size), random.Random(7), "rdma-killed:1"
        for number in range(1, 4):
            with PeerProcess(etcd, "rdma", name, env=on_two(nics)) as peer:
                remote = peer.call("allocate", size)
                link = Link(ours, peer, ours.open_segment(name), local, remote)
                assert number == 1 or (local == 100 + number - 1).all()
                local[:] = number
                link.run(link.request(WRITE, 0, 0, size))
                assert peer.call("uniform", remote) == number
                both = link.request(WRITE, 0, 0, size), link.request(READ, 0, 0, size)
                batch = ours.submit(requests(*both * 25))
                time.sleep(chooser.uniform(0, 0.1))
                peer.process.kill()
                with pytest.raises(PeerLost, match=name):
                    batch.wait(40)
                local[:] = 100 + number
        assert (local == 100 + number).all()


class Place:
    """Victims under one name, one after the other: they write their number over the same memory of ours until they are
    killed, while we read and write theirs over the same queue pairs."""

    def __init__(self, ours: TransferEngine, nics: list[str], number: int) -> None:
        self._ours, self._random = ours, random.Random(number)
        port = str(RPC_PORT + number)
        self._env = on_two(nics, MC_MIN_RPC_PORT=port, MC_MAX_RPC_PORT=port)
        self._written, self._read, self._source = (ours.allocate(SIZE) for _ in range(3))
        self.lost = 0  # batches of ours that the death broke; the others were done just before

    def kill_one(self, number: int) -> None:
        assert number == 1 or (self._read == 128 + number - 1).all()  # nothing landed since the last one's end
        with PeerProcess("P2PHANDSHAKE", "rdma", env=self._env) as victim:
            remote = victim.call("allocate", SIZE)
            link = Link(self._ours, victim, self._ours.open_segment(victim.name), self._read, remote)
            self._source[:] = number
            write = WRITE, link.segment.id, int(self._source.ctypes.data), remote, SIZE
            link.run(write)  # nothing else than the number can be read from now on
            victim.call("hammer", self._ours.name, int(self._written.ctypes.data), SIZE, True, number)
            deadline = time.monotonic() + ARRIVAL_TIMEOUT
            while self._written[-1] != number or not (self._written == number).all():
                assert time.monotonic() < deadline, victim.call("stop_hammer")
                time.sleep(0.02)
            batch = self._ours.submit(requests(*(write, link.request(READ, 0, 0, SIZE)) * 64))
            time.sleep(self._random.uniform(0, SPAN))
            victim.kill()
        assert (self._written == number).all()
        self._written[:] = 0
        time.sleep(LATER)
        assert not self._written.any()
        with contextlib.suppress(PeerLost):
            self.lost += 1
            batch.wait(40)
            self.lost -= 1
        self._read[:] = 128 + number


def test_nodes_killed_at_random_points_while_addresses_are_rewritten(nics: list[str]) -> None:
    """Of the dead nothing lands any more, neither what they wrote nor answers to what we read."""
    with two_devices("P2PHANDSHAKE", nics) as ours, ThreadPoolExecutor(TOGETHER) as threads:
        places = [Place(ours, nics, number) for number in range(TOGETHER)]

        def kill_all(place: Place) -> None:
            for number in range(1, POINTS // TOGETHER + 1):
                place.kill_one(number)

        list(threads.map(kill_all, places))
        lost = sum(place.lost for place in places)
        print(f"{lost} of {POINTS} broke a batch")
        assert lost > POINTS // 2


def test_a_killed_initiator_is_replaced_under_its_name_at_once(etcd: str, nics: list[str]) -> None:
    """Each writes its number over the same memory until SIGKILL; of the dead nothing lands any more."""
    chooser, name = random.Random(8), "rdma-killed-initiator:1"
    with two_devices(etcd, nics) as ours:
        memory = ours.allocate(1 << 20)
        for number in range(1, 4):
            with PeerProcess(etcd, "rdma", name, env=on_two(nics)) as peer:
                peer.call("hammer", ours.name, int(memory.ctypes.data), memory.size, True, number)
                deadline = time.monotonic() + ARRIVAL_TIMEOUT
                while not (memory == number).all():
                    assert time.monotonic() < deadline, peer.call("stop_hammer")
                    time.sleep(0.01)
                time.sleep(chooser.uniform(0, 0.05))
                peer.kill()
            assert (memory == number).all()
            memory[:] = 0
            time.sleep(LATER)
            assert not memory.any()
