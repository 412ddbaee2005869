"""One process of the soak: `python -m soak.worker ETCD PROTOCOL INDEX NAME…` does all that a user may do, at random.

The names are all workers', the first of which are never killed or stopped. Each has a region of as many sections
as there are workers, and one more, which all may read and nobody writes. Once a second it prints what it has done.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import os
import random
import select
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mooncake_hpc import READ, REQUEST, WRITE, P2PStore, Segment, TransferEngine
from mooncake_hpc.core.errors import (
    MooncakeError,
    ObjectNotFound,
    ObjectReplaced,
    PeerLost,
    TransferCancelled,
    TransferError,
)
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.testing.peer import fill, pattern

STEADY = 3  # workers that live as long as the soak
SECTION = 256 << 10
MARK = "cpu:7"  # the location by which others find the region among our buffers
OBJECT_BYTES = 1 << 20
PAUSE = 6.0  # times as long as a step took, it does nothing
MOST_PAUSE_S, LEAST_PAUSE_S = 0.5, 0.02
Bytes = npt.NDArray[np.uint8]


class WrongBytes(Exception):
    """What arrived is not what was sent."""


class Worker:
    def __init__(self, etcd: str, protocol: str, index: int, names: list[str]) -> None:
        self.etcd, self.protocol, self.index, self.names = etcd, protocol, index, names
        self.chance = random.Random(os.getpid())
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.metadata = open_store(etcd)
        self.engine = TransferEngine(names[index], self.metadata, protocol=protocol, bind_address="127.0.0.1")
        self.store = P2PStore(metadata=self.metadata, engine=self.engine)
        self.region = self.engine.allocate(SECTION * (len(names) + 1), MARK)
        self.known = pattern(1, SECTION)
        fill(self.region[-SECTION:], 1)
        self.local = self.engine.allocate(SECTION)
        self.back = self.engine.allocate(SECTION)
        self.held: str = ""
        self.offered = -60.0
        self.offer("")

    # --- what is done ---------------------------------------------------------------------------------------

    def steps(self) -> dict[Callable[[str], None], int]:
        """Each step, and how often it is taken."""
        return {
            self.write_and_read: 30,
            self.read_known: 20,
            self.submit_many: 8,
            self.cancel: 4,
            self.notify: 6,
            self.pull: 4,
            self.offer: 2,
            self.drop_connections: 4,
            self.register_and_unregister: 4,
            self.open_engine: 1,
            self.list_all: 2,
        }

    def _segment(self, name: str) -> tuple[Segment, int]:
        """The peer and the address of its region."""
        segment = self.engine.open_segment(name)
        found = [b.address for b in segment.buffers if b.name == MARK]
        if not found:
            raise PeerLost(f"{name} has no region yet")
        return segment, found[0]

    def _piece(self) -> tuple[int, int]:
        length = self.chance.choice((1, 8, 1000, 4096, 65536, SECTION))
        return self.chance.randrange(SECTION - length + 1), length

    def write_and_read(self, peer: str) -> None:
        segment, base = self._segment(peer)
        at, length = self._piece()
        fill(self.local, self.chance.getrandbits(30))
        address = base + self.index * SECTION + at
        self.engine.write(self.local[:length], segment, address, timeout=10)
        self.engine.read(self.back[:length], segment, address, timeout=10)
        self._same(self.back[:length], self.local[:length], peer)

    def read_known(self, peer: str) -> None:
        segment, base = self._segment(peer)
        at, length = self._piece()
        self.engine.read(self.back[:length], segment, base + len(self.names) * SECTION + at, timeout=10)
        self._same(self.back[:length], self.known[at : at + length], peer)

    def submit_many(self, peer: str) -> None:
        segment, base = self._segment(peer)
        count, length = self.chance.choice((2, 16, 64)), 4096
        requests = np.zeros(count, REQUEST)
        offsets = np.arange(count) * length
        requests["opcode"], requests["target_id"] = READ, segment.id
        requests["local_addr"] = self.back.ctypes.data + offsets
        requests["remote_addr"] = base + len(self.names) * SECTION + offsets
        requests["length"] = length
        self.engine.submit(requests).wait(10)
        self._same(self.back[: count * length], self.known[: count * length], peer)

    def cancel(self, peer: str) -> None:
        segment, base = self._segment(peer)
        record = (WRITE, segment.id, self.local.ctypes.data, base + self.index * SECTION, SECTION)
        batch = self.engine.submit(np.array([record] * 8, REQUEST))
        batch.cancel()
        with contextlib.suppress(TransferCancelled):
            batch.wait(10)

    def notify(self, peer: str) -> None:
        self.engine.notify(self.engine.open_segment(peer), self.engine.name, "x" * self.chance.randrange(2000))

    def pull(self, peer: str) -> None:
        if self.held:
            self.store.delete_replica(self.held)
            self.held = ""
        name = f"soak/{peer}"
        try:
            replica = self.store.get_replica(name, timeout=30)
        except (ObjectNotFound, ObjectReplaced):
            self.counts["object away"] += 1
            return
        self.held = name
        (data,) = replica.arrays
        seed = int(data[:8].view(np.uint64)[0])
        self._same(data[8:], pattern(seed, OBJECT_BYTES)[8:], peer)

    def offer(self, _peer: str) -> None:
        if self.index >= STEADY or time.monotonic() < self.offered + 10:
            return
        self.offered = time.monotonic()
        seed = self.chance.getrandbits(30)
        data = pattern(seed, OBJECT_BYTES)
        data[:8].view(np.uint64)[0] = seed
        self.store.register(f"soak/{self.names[self.index]}", data, force=True)

    def drop_connections(self, peer: str) -> None:
        segment, _ = self._segment(peer)
        host, port = segment.endpoint()
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1) as client:
            client.sendall(self.chance.randbytes(self.chance.choice((0, 1, 23))))

    def register_and_unregister(self, _peer: str) -> None:
        memory = np.zeros(self.chance.choice((1, 4096, 1 << 20)), np.uint8)
        self.engine.register(memory)
        other = self.engine.allocate(1 << 16)
        self.engine.unregister_many([memory, other])

    def open_engine(self, peer: str) -> None:
        name = f"soak-guest-{os.getpid()}:{self.chance.randrange(1000)}"
        with TransferEngine(name, self.etcd, protocol=self.protocol, bind_address="127.0.0.1") as guest:
            memory = guest.allocate(4096)
            segment = guest.open_segment(peer)
            base = next((b.address for b in segment.buffers if b.name == MARK), 0)
            if base:
                guest.read(memory, segment, base + len(self.names) * SECTION, timeout=10)
                self._same(memory, self.known[:4096], peer)

    def list_all(self, _peer: str) -> None:
        self.store.list("soak/")
        for name in self.names[:STEADY]:
            if not any(self.engine.probe(name) for _ in range(5)):  # this machine may be busy with other things
                self.fail(f"{name}, which lives, answers no Probe")

    def _same(self, got: Bytes, expected: Bytes, peer: str) -> None:
        self.counts["bytes"] += got.size
        if not np.array_equal(got, expected):
            raise WrongBytes(f"{np.count_nonzero(got != expected)} of {got.size} bytes from {peer}")

    # --- going on -------------------------------------------------------------------------------------------

    def step(self) -> None:
        steps = self.steps()
        (step,) = self.chance.choices(list(steps), list(steps.values()))
        peer = self.chance.choice([name for name in self.names if name != self.engine.name])
        steady = self.names.index(peer) < STEADY
        began = time.monotonic()
        try:
            step(peer)
            self.counts[step.__name__] += 1
        except MooncakeError as error:
            kind = type(error).__name__
            self.counts[f"{'steady' if steady else 'mortal'} {kind}"] += 1
            if steady and isinstance(error, TransferError):
                self.fail(f"{step.__name__} with {peer}, which lives: {kind}: {error}")
        except Exception:
            self.fail(f"{step.__name__} with {peer}: {traceback.format_exc()}")
        self.counts["notifications taken"] += len(self.engine.notifications())
        took = time.monotonic() - began
        time.sleep(min(MOST_PAUSE_S, max(LEAST_PAUSE_S, PAUSE * took)))

    def fail(self, text: str) -> None:
        self.failures.append(f"{time.strftime('%H:%M:%S')} {self.engine.name}: {text}")

    def tell(self) -> None:
        print(json.dumps({"counts": self.counts, "failures": self.failures}), flush=True)
        self.counts, self.failures = Counter(), []

    def run(self) -> None:
        """Until a line comes; then stay, for those that still have us as a peer, until the standard input ends."""
        told = time.monotonic()
        while not select.select([sys.stdin], [], [], 0)[0]:
            self.step()
            if time.monotonic() > told + 1.0:
                told = time.monotonic()
                gc.collect()
                self.tell()
        self.tell()
        print(json.dumps({"quiet": True}), flush=True)
        sys.stdin.read()

    def close(self) -> None:
        self.store.close()
        self.engine.close()
        self.metadata.close()


def main() -> None:
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor's to tell
    etcd, protocol, index, *names = sys.argv[1:]
    worker = Worker(etcd, protocol, int(index), names)
    print(json.dumps({"up": True}), flush=True)
    worker.run()
    worker.close()


if __name__ == "__main__":
    main()
