"""RDMA connections break at random points while the same addresses are rewritten, and no older byte ever lands.

On devices of software, whose every work request is carried out or refused at the will of the test; over real ones
processes are killed, in tests/rdma/test_kills.py.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import fake_fabric
import numpy as np
import numpy.typing as npt
import pytest
from fake_fabric import Fabric, QueuePair

from mooncake_hpc import READ, REQUEST, WRITE, TransferEngine
from mooncake_hpc.core.settings import RdmaSettings, Settings

POINTS = 200  # connections broken in a test, each with work requests under way
BLOCKS = [64, 4096, 65_536, 150_000]  # bytes of the requests of a round, six times over
SIZE = 6 * sum(BLOCKS)
SETTINGS = Settings(rdma=RdmaSettings(rail_pause=0.02, slice_size=16_384, retries=50))


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with fake_fabric.installed() as fabric:
        yield fabric
        assert not fabric.devices and not fabric.pairs and not fabric.queues and not fabric.regions


class Network(threading.Thread):
    """Carries out a few work requests of random queue pairs at a time, and breaks one when it is told to.

    What the broken one's siblings (the other queue pairs of its connection) have under way is stuck then, and would be
    carried out two transfers later, unless they are put into ERR too.
    """

    def __init__(self, fabric: Fabric, ways: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self._ways = ways
        self._fabric, self._random, self._over = fabric, random.Random(21), False
        self._left = -1  # work requests until a queue pair breaks; below 0: none does
        # queue pairs by transfer, the last one's at the right
        self._stuck: deque[set[int]] = deque([set(), set(), set()])
        self.broken = 0

    def break_within(self, most: int) -> None:
        with self._fabric.lock:
            self._left = self._random.randrange(most)

    def run(self) -> None:
        self._fabric.held = True
        while not self._over:
            with self._fabric.lock:
                if busy := self._busy():
                    self._work(self._random.choice(busy))
            time.sleep(0)
        self._fabric.release()

    def drain(self) -> None:
        """Until all is carried out but what got stuck in this transfer and the one before."""
        with self._fabric.lock:
            self._stuck.popleft()
        deadline = time.monotonic() + 30
        while self._busy():
            assert time.monotonic() < deadline and self.is_alive()
            time.sleep(0)
        with self._fabric.lock:
            self._stuck.append(set())

    def _busy(self) -> list[QueuePair]:
        with self._fabric.lock:
            stuck = set().union(*self._stuck)
            pairs = [pair for number, pair in self._fabric.pairs.items() if number not in stuck]
        return [pair for pair in pairs if pair.waiting and not pair.broken]

    def stop(self) -> None:
        self._over = True
        self.join(10)

    def _device(self, number: int) -> str:
        pair = self._fabric.pairs.get(number)
        return pair.device if pair is not None else ""

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
        path = pair.device, self._device(pair.peer)
        self._stuck[-1] |= {
            number
            for number, other in self._fabric.pairs.items()
            if other is not pair and (other.device, self._device(other.peer)) == path
        }
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
    """Moves the round's number over the same memory, there or here, and compares all of it.

    Rounds take turns at three sources: a work request of an earlier round that is carried out late would bring an older
    number.
    """

    def __init__(self, here: TransferEngine, there: TransferEngine, network: Network) -> None:
        self._here, self._segment, self._network = here, here.open_segment(there.name), network
        sources = {WRITE: here, READ: there}
        self._sources = {opcode: at.allocate(3 * SIZE).reshape(3, SIZE) for opcode, at in sources.items()}
        self._targets = {WRITE: there.allocate(SIZE), READ: here.allocate(SIZE)}
        self._random = random.Random(20)

    def transfer(self, opcode: int, number: int) -> None:
        source, target = self._sources[opcode][number % 3], self._targets[opcode]
        source[:] = number
        ours, theirs = (source, target) if opcode == WRITE else (target, source)
        batch = self._here.submit(self._requests(opcode, int(ours.ctypes.data), int(theirs.ctypes.data)))
        batch.wait(30)
        assert (batch.status == 1).all()
        self._network.drain()
        assert (target == number).all()

    def _requests(self, opcode: int, ours: int, theirs: int) -> npt.NDArray[np.void]:
        at, records = 0, []
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
        network, number = Network(fabric, ways), 0
        link = Rewriting(here, there, network)
        network.start()
        try:
            link.transfer(WRITE, number)
            pieces = SIZE // SETTINGS.rdma.slice_size
            while network.broken < POINTS:
                number = number % 255 + 1
                for opcode in (WRITE, READ):
                    network.break_within(pieces)
                    link.transfer(opcode, number)
        finally:
            network.stop()
