"""What a very large object with many holders costs etcd: sizes simulated, an etcd that is real.

Every holder has an `Announcer` and a watch of its own over a connection of its own, and gets shards as fast as its
record can say. Nothing is transferred.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np

from mooncake_hpc.metadata.embedded import EmbeddedEtcd
from mooncake_hpc.metadata.etcd import REQUEST_LIMIT
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.p2p.availability import Place, board_size
from mooncake_hpc.p2p.catalog import Announcer, Catalogue, Holder
from mooncake_hpc.p2p.manifest import Manifest

PERIOD = 0.05  # seconds in which every holder gets shards


@dataclass(frozen=True, slots=True)
class Metadata:
    """Sizes in bytes; `writes` a second in etcd, `events` a second that it told all watches together."""

    shards: int
    holders: int
    manifest: int
    record: int
    board: int
    limit: int
    writes: float
    events: float
    seconds: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class _Holders:
    def __init__(self, stack: ExitStack, endpoint: str, manifest: Manifest, number: int) -> None:
        self.events = self.largest = 0
        self._lock = threading.Lock()
        self._have = np.zeros((number, manifest.shards), bool)
        self._rng = np.random.default_rng(1)
        self.announcers = []
        for index in range(number):
            store = stack.enter_context(open_store(endpoint))
            catalogue = Catalogue(store, "")
            if index == 0:
                catalogue.publish(manifest, ours=False, force=False)
            key = catalogue.holder_key(manifest, f"10.77.{index}.1:12345")
            self.announcers.append(Announcer(store, key, lambda i=index: self._record(i), lambda: number))
            stack.enter_context(store.watch(catalogue.prefix(manifest.name), self._changed))

    def _record(self, index: int) -> Holder:
        name, have = f"10.77.{index}.1:12345", self._have[index].copy()
        sources = tuple(f"10.77.{other}.1:12345" for other in range(8))
        record = Holder(name, "0123456789abcdef", f"{index:016x}", (1 << 46,), have, Place(1 << 46, 1 << 60), sources)
        self.largest = max(self.largest, len(record.to_json()))
        return record

    def _changed(self, changes: object) -> None:
        with self._lock:
            self.events += len(changes)  # type: ignore[arg-type]

    def step(self) -> None:
        """Every holder gets some shards."""
        for index, announcer in enumerate(self.announcers):
            self._have[index, self._rng.integers(0, self._have.shape[1], 8)] = True
            announcer.changed()


def measure(size: int, shard_size: int, holders: int, seconds: float) -> Metadata:
    """Let `holders` announce for so long."""
    shards = -(-size // shard_size)
    digests = np.random.default_rng(2).bytes(16 * shards)
    manifest = Manifest("model", "0123456789abcdef", (size,), shard_size, "xxh3-128", digests)
    with EmbeddedEtcd() as etcd, ExitStack() as stack:
        all_ = _Holders(stack, etcd.endpoint, manifest, holders)
        watcher = stack.enter_context(open_store(etcd.endpoint))
        _, before = watcher.list_at("mooncake_hpc/nothing")  # type: ignore[attr-defined]
        begin, told = time.monotonic(), all_.events
        while time.monotonic() - begin < seconds:
            all_.step()
            time.sleep(PERIOD)
        _, after = watcher.list_at("mooncake_hpc/nothing")  # type: ignore[attr-defined]
        took, told = time.monotonic() - begin, all_.events - told
        for announcer in all_.announcers:
            announcer.finish(5.0)
    text = manifest.to_json()
    return Metadata(
        shards, holders, len(text), all_.largest, board_size(shards), REQUEST_LIMIT, (after - before) / took,
        told / took, took,
    )  # fmt: skip
