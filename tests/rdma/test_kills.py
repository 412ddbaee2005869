"""RDMA nodes killed by SIGKILL at random points while the same addresses are rewritten with the round's number.

`tests/test_rdma_breaks.py` does so with many more points, on devices of software.
"""

from __future__ import annotations

import os
import random
import time

import pytest
from rdma_resources import nothing_is_left as nothing_is_left

from mooncake_hpc import READ, WRITE, TransferEngine
from mooncake_hpc.errors import PeerLost
from mooncake_hpc.testing.link import HOST, Link, requests
from mooncake_hpc.testing.peer import PeerProcess

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("forked_peers")]

SIZE = 4 << 20
KILLS = 10  # more cost too much of the emulated guest's time


def two_devices(etcd: str, nics: list[str]) -> TransferEngine:
    return TransferEngine("ours:1", etcd, protocol="rdma", bind_address=HOST, device_name=",".join(nics[:2]))


def on_two(nics: list[str]) -> dict[str, str]:
    """A peer's environment."""
    return {**os.environ, "MC_TE_FILTERS": ",".join(nics[:2])}


def test_a_killed_target_is_replaced_under_its_name_at_once(etcd: str, nics: list[str]) -> None:
    """What was under way ends with an error, and afterwards touches no memory of ours."""
    with two_devices(etcd, nics) as ours:
        local, chooser, name = ours.allocate(SIZE), random.Random(7), "rdma-killed:1"
        for number in range(1, 4):
            with PeerProcess(etcd, "rdma", name, env=on_two(nics)) as peer:
                remote = peer.call("allocate", SIZE)
                link = Link(ours, peer, ours.open_segment(name), local, remote)
                assert number == 1 or (local == 100 + number - 1).all()
                local[:] = number
                link.run(link.request(WRITE, 0, 0, SIZE))
                assert peer.call("uniform", remote) == number
                both = link.request(WRITE, 0, 0, SIZE), link.request(READ, 0, 0, SIZE)
                batch = ours.submit(requests(*both * 25))
                time.sleep(chooser.uniform(0, 0.1))
                peer.process.kill()
                with pytest.raises(PeerLost, match=name):
                    batch.wait(40)
                local[:] = 100 + number
        assert (local == 100 + number).all()


def test_initiators_killed_at_random_points_while_they_rewrite(etcd: str, nics: list[str]) -> None:
    """Each writes its number over the same memory until SIGKILL; of the dead nothing lands any more."""
    chooser, name = random.Random(8), "rdma-killed-initiator:1"
    with two_devices(etcd, nics) as ours:
        memory = ours.allocate(1 << 20)
        for number in range(1, KILLS + 1):
            with PeerProcess(etcd, "rdma", name, env=on_two(nics)) as peer:
                peer.call("hammer", ours.name, int(memory.ctypes.data), memory.size, True, number)
                deadline = time.monotonic() + 40
                while not (memory == number).all():
                    assert time.monotonic() < deadline, peer.call("stop_hammer")
                    time.sleep(0.01)
                time.sleep(chooser.uniform(0, 0.05))
                peer.kill()
            assert (memory == number).all()
            memory[:] = 0
            time.sleep(0.05)
            assert not memory.any()
