"""RDMA connections break at random points while the same addresses are rewritten, and no older byte ever lands.

On devices of software, whose every work request is carried out or refused at the will of the test; over real ones
processes are killed, in tests/rdma/test_kills.py.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence

import fake_fabric
import numpy as np
import numpy.typing as npt
import pytest
from fake_fabric import Fabric, QueuePair

from mooncake_hpc import READ, REQUEST, WRITE, TransferEngine
from mooncake_hpc.settings import RdmaSettings, Settings

POINTS = 200  # connections broken in a test, each with work requests under way
BLOCKS = [64, 4096, 65_536, 150_000]  # bytes of the requests of a round, six times over
SIZE = 6 * sum(BLOCKS)
SETTINGS = Settings(rdma=RdmaSettings(rail_pause=0.0, slice_size=16_384, retries=50))


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with fake_fabric.installed() as fabric:
        yield fabric
        assert not fabric.devices and not fabric.pairs and not fabric.queues and not fabric.regions


class Network(threading.Thread):
    """Carries out a few work requests of random queue pairs at a time, and breaks one when it is told to."""

    def __init__(self, fabric: Fabric, ways: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self._ways = ways
        self._fabric, self._random, self._over = fabric, random.Random(21), False
        self._left = -1  # work requests until a queue pair breaks; below 0: none does
        self.broken = 0

    def break_within(self, most: int) -> None:
        with self._fabric.lock:
            self._left = self._random.randrange(most)

    def run(self) -> None:
        self._fabric.held = True
        while not self._over:
            with self._fabric.lock:
                busy = [pair for pair in self._fabric.pairs.values() if pair.waiting and not pair.broken]
                if busy:
                    self._work(self._random.choice(busy))
            time.sleep(0)
        self._fabric.release()

    def stop(self) -> None:
        self._over = True
        self.join(10)

    def _work(self, pair: QueuePair) -> None:
        count = self._random.randint(1, 8)
        if not 0 <= self._left < count:
            self._left -= count if self._left >= 0 else 0
            pair.advance(count)
            return
        pair.advance(self._left)
        if not pair.waiting or pair.broken:
            return
        self._left = -1
        self.broken += 1
        other = self._fabric.pairs.get(pair.peer)
        match self._random.choice(self._ways):
            case "peer's" if other:
                other.to_error()
            case "port":
                self._fabric.unplug(pair.device)
                pair.to_error()
                self._fabric.plug(pair.device)
            case how:
                pair.fail(landed=how == "answer lost")


class Rewriting:
    """Writes the round's number over the same memory, or reads it back, with every round compared."""

    def __init__(self, here: TransferEngine, there: TransferEngine) -> None:
        self._here, self._segment = here, here.open_segment(there.name)
        self.ours, self.theirs = here.allocate(SIZE), there.allocate(SIZE)
        self._random = random.Random(20)

    def transfer(self, opcode: int) -> None:
        batch = self._here.submit(self._requests(opcode))
        batch.wait(30)
        assert (batch.status == 1).all()

    def _requests(self, opcode: int) -> npt.NDArray[np.void]:
        at, records = 0, []
        ours, theirs = int(self.ours.ctypes.data), int(self.theirs.ctypes.data)
        for length in self._random.sample(BLOCKS * 6, 6 * len(BLOCKS)):
            records.append((opcode, self._segment.id, ours + at, theirs + at, length))
            at += length
        return np.array(records, REQUEST)


def engine(name: str, devices: str, store: str) -> TransferEngine:
    return TransferEngine(
        name, store, protocol="rdma", bind_address="127.0.0.1", device_name=devices, settings=SETTINGS
    )


@pytest.mark.slow
@pytest.mark.parametrize("devices", [("a", "b"), ("a,b", "c,d")], ids=["1 path", "4 paths"])
def test_connections_break_at_random_points(fabric: Fabric, devices: tuple[str, str]) -> None:
    ways = ["lost", "answer lost", "peer's"]
    if "," in devices[0]:  # a batch fails when the only device is down
        ways.append("port")
    store = f"memory://breaks-{devices[0]}"
    with engine("there:1", devices[1], store) as there, engine("here:1", devices[0], store) as here:
        link, network, number = Rewriting(here, there), Network(fabric, ways), 0
        network.start()
        try:
            link.transfer(WRITE)
            pieces = SIZE // SETTINGS.rdma.slice_size
            while network.broken < POINTS:
                number = number % 255 + 1
                link.ours[:] = number
                network.break_within(pieces)
                link.transfer(WRITE)
                assert (link.theirs == number).all()
                link.ours[:] = 0
                network.break_within(pieces)
                link.transfer(READ)
                assert (link.ours == number).all()
        finally:
            network.stop()
