"""Holders, near and far, that are wrong, dead, stopped or lying: the right bytes come from the good one elsewhere."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
from conftest import clean_env
from test_store import SHARD, Open, content, opener  # noqa: F401 - a fixture

from mooncake_hpc.p2p import P2PStore
from mooncake_hpc.p2p.availability import CLAIMS, Board, board_size
from mooncake_hpc.p2p.catalog import Holder
from mooncake_hpc.p2p.local_objects import Held
from mooncake_hpc.p2p.manifest import Manifest

pytestmark = pytest.mark.slow

SHARDS = 48
WITHIN_S = 10.0  # twice what it takes, 5 s, and 3 s for the bad one


def a_replica(store: P2PStore, manifest: Manifest) -> np.ndarray:
    replica = store.get_replica(manifest.name, timeout=60)
    return replica.arrays[0]


def wrong(store: P2PStore, manifest: Manifest) -> None:
    a_replica(store, manifest)[:] ^= 1


def wrong_in_one_shard(store: P2PStore, manifest: Manifest) -> None:
    a_replica(store, manifest)[5] ^= 1


def not_answering(store: P2PStore, manifest: Manifest) -> None:
    """Its lease lives on, and nothing that it has published can be read."""
    a_replica(store, manifest)
    for transport in store.engine._transports:
        transport.server.export([], shrinks=True)  # type: ignore[attr-defined]


def an_old_record(store: P2PStore, manifest: Manifest) -> None:
    """Of a process that is gone, and of one whose name now belongs to another."""
    for name in ("127.0.0.1:1", store.name):
        record = Holder(name, "0" * 16, store._holdings.host, (4096,), np.ones(manifest.shards, bool), None, (), False)
        store._catalogue.store.publish(store._catalogue.holder_key(manifest, name), record.to_json())


def a_board(store: P2PStore, manifest: Manifest, have: bool) -> Board:
    """The board of a reader that has nothing. Its record says so, the board whatever `have` is."""
    nothing = np.zeros(manifest.shards, bool)
    board = Board(store._holdings.boards.take(board_size(manifest.shards)), nothing | have)
    held = Held(manifest, [np.zeros(manifest.size, np.uint8)], [], False, nothing, board)
    store._holdings.register_memory(held, held.arrays)
    store._holdings.offer(held)
    store._holdings.add(manifest.name, held)
    return board


def a_board_that_shows_all(store: P2PStore, manifest: Manifest) -> None:
    a_board(store, manifest, True)


def a_board_that_shows_what_is_never_fetched(store: P2PStore, manifest: Manifest) -> None:
    board = a_board(store, manifest, False)
    for shard in range(CLAIMS):
        board.claim("trainer", shard)


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize(
    "spoil",
    [
        wrong, wrong_in_one_shard, not_answering, an_old_record, a_board_that_shows_all,
        a_board_that_shows_what_is_never_fetched,
    ],
)  # fmt: skip
def test_the_right_bytes_come_from_the_good_holder(
    opener: Open,  # noqa: F811
    spoil: Callable[[P2PStore, Manifest], None],
    near: bool,
) -> None:
    trainer, bad, reader = opener(), opener(), opener()
    trainer._holdings.host = "another host"
    if not near:
        bad._holdings.host = "a third host"
    data = content(SHARDS * SHARD)
    manifest = trainer.register("o", data, shard_size=SHARD)
    spoil(bad, manifest)
    begin = time.monotonic()
    replica = reader.get_replica("o", timeout=60)
    assert np.array_equal(replica.arrays[0], data) and replica.progress.sources[trainer.name]
    assert time.monotonic() - begin < WITHIN_S


HOLD = """
import sys, time
import numpy as np
from mooncake_hpc.p2p import P2PStore
from mooncake_hpc.core.settings import Settings
etcd, name, host, shards, size = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
with P2PStore(name, etcd, protocol="tcp", settings=Settings(lease_ttl=60, tcp_bind_address="127.0.0.1")) as store:
    store._holdings.host = host or store._holdings.host
    if host:
        data = np.random.default_rng(1).integers(0, 256, shards * size, np.uint8)
        store.register("stopped", data, shard_size=size)
    else:
        store.get_replica("stopped", timeout=30)
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_stopped_holder_on_this_host(etcd: str) -> None:
    holders = []
    try:
        for name, host in (("127.0.0.1:33001", "elsewhere"), ("127.0.0.1:33002", "")):
            words = [etcd, name, host, str(SHARDS), str(SHARD)]
            holders.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-c", HOLD, *words], env=clean_env(), text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )
            )  # fmt: skip
            assert holders[-1].stdout is not None and holders[-1].stdout.readline() == "ready\n"
        holders[1].send_signal(signal.SIGSTOP)
        with P2PStore("127.0.0.1:33003", etcd, protocol="auto") as reader:
            begin = time.monotonic()
            replica = reader.get_replica("stopped", timeout=60)
            seconds = time.monotonic() - begin
            assert np.array_equal(replica.arrays[0], content(SHARDS * SHARD))
        assert seconds < WITHIN_S
    finally:
        for holder in holders:  # they end by themselves, so that none of their keys is left
            holder.send_signal(signal.SIGCONT)
            try:
                holder.communicate(timeout=30)
            finally:
                holder.kill()
