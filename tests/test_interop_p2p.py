"""An object as the original's P2P Store publishes it, whose bytes lie in a target of the original's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from interop import VERSIONS, bench_target, peer_bench
from test_interop_bench import published, unused_name

from mooncake_hpc import TransferEngine
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.p2p import P2PStore

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

MIB = 1 << 20
SIZES = (5 * MIB + 12345, 3 * MIB)
MAX_SHARD = 2 * MIB


def shards(bases: list[int], segment: str) -> list[dict[str, object]]:
    return [
        {
            "size": min(MAX_SHARD, size - at),
            "gold": [{"segment_name": segment, "offset": base + at}],
            "replica_list": None,
        }
        for base, size in zip(bases, SIZES, strict=True)
        for at in range(0, size, MAX_SHARD)
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_object_of_the_originals(etcd: str, version: str) -> None:
    """A value written by hand after the original's schema; its gold is filled by WRITE first."""
    model = [np.random.default_rng(size).integers(0, 256, size, np.uint8) for size in SIZES]
    name, ours = unused_name(), unused_name()
    flags = (f"--metadata_server={etcd}", f"--local_server_name={name}", f"--buffer_size={16 * MIB}", "--threads=1")
    with (
        bench_target(peer_bench(version), *flags, ready=lambda _: published(etcd, name)),
        open_store(etcd) as store,
    ):
        with TransferEngine(unused_name(), etcd, protocol="tcp", bind_address="127.0.0.1") as writer:
            segment = writer.open_segment(name)
            base = segment.buffers[0].address
            bases = [base, base + SIZES[0] + 64]
            for data, place in zip(model, bases, strict=True):
                writer.register(data)
                writer.write(data, segment, place)
        whole = {"name": "foo/bar", "size": sum(SIZES), "size_list": SIZES, "max_shard_size": MAX_SHARD}
        store.publish("mooncake/checkpoint/foo/bar", json.dumps({**whole, "shards": shards(bases, name)}))
        with P2PStore(ours, etcd, protocol="tcp", bind_address="127.0.0.1") as reader:
            replica = reader.get_replica("foo/bar", timeout=60)
            assert [info.holders for info in reader.list("foo/bar")] == [{name: 5}]
            assert all(np.array_equal(a, b) for a, b in zip(replica.arrays, model, strict=True))
            assert replica.progress.sources == {name: sum(SIZES)}
