"""Pulls from a process whose memory is mapped: copied, not read over the wire, and verified all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from mooncake_hpc.core.errors import IntegrityError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.engine.engine import TransferEngine
from mooncake_hpc.p2p import P2PStore
from mooncake_hpc.p2p.digests import ALGORITHMS

SHARD = 1 << 16
Open = Callable[[], P2PStore]


@pytest.fixture
def opener(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[Open]:
    """Opens stores that see one another, by shared memory where it is possible."""
    count = 0
    with ExitStack() as stack:

        def open_one() -> P2PStore:
            nonlocal count
            count += 1
            space = f"memory://{request.node.name}"
            store = P2PStore(f"127.0.0.1:{21000 + count}", space, protocol="auto", settings=Settings(lease_ttl=1.0))
            return stack.enter_context(store)

        yield open_one


def allocated(store: P2PStore, *sizes: int) -> list[np.ndarray]:
    """Buffers of random bytes that others can map."""
    buffers = [store.allocate(size) for size in sizes]
    for seed, buffer in enumerate(buffers):
        buffer[:] = np.random.default_rng(seed).integers(0, 256, len(buffer), np.uint8)
    return buffers


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_buffers_of_odd_sizes(opener: Open, algorithm: str) -> None:
    trainer, reader = opener(), opener()
    data = allocated(trainer, 3 * SHARD + 5, 100, 1, 2 * SHARD - 77, 63)
    trainer.register("o", data, shard_size=SHARD, algorithm=algorithm)
    out = [np.zeros(len(buffer) + 1, np.uint8)[1:] for buffer in data]
    progress = reader.get_replica("o", out, timeout=60).progress
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(out, data, strict=True))
    assert progress.transports == {trainer.name: "shm"}
    assert progress.sources == {trainer.name: sum(map(len, data))}


def test_a_byte_range(opener: Open) -> None:
    trainer, reader = opener(), opener()
    (data,) = allocated(trainer, 5 * SHARD)
    trainer.register("o", data, shard_size=SHARD)
    part = reader.get_replica("o", byte_range=(SHARD - 3, 3 * SHARD + 9), timeout=60).arrays[0]
    assert np.array_equal(part, data[SHARD - 3 : 3 * SHARD + 9])


def test_memory_that_nobody_else_can_map_comes_over_the_wire(opener: Open) -> None:
    trainer, reader = opener(), opener()
    (mapped,) = allocated(trainer, 2 * SHARD)
    data = [mapped, np.arange(SHARD, dtype=np.uint8)]
    trainer.register("o", data, shard_size=SHARD)
    replica = reader.get_replica("o", timeout=60)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(replica.arrays, data, strict=True))


@pytest.mark.slow
def test_one_changed_byte_is_noticed(opener: Open) -> None:
    trainer, reader = opener(), opener()
    (data,) = allocated(trainer, 4 * SHARD)
    trainer.register("o", data, shard_size=SHARD)
    data[2 * SHARD + 12_345] ^= 1
    with pytest.raises(IntegrityError, match="shard 2"):
        reader.get_replica("o", timeout=60)
    data[2 * SHARD + 12_345] ^= 1
    assert np.array_equal(reader.get_replica("o", timeout=60).arrays[0], data)


def test_mapped_memory_stays_readable_and_is_not_offered_once_unregistered(no_leaks: None) -> None:
    settings, space = Settings(lease_ttl=1.0), "memory://mapped"
    with (
        TransferEngine("127.0.0.1:21001", space, protocol="auto", settings=settings) as peer,
        TransferEngine("127.0.0.1:21002", space, protocol="auto", settings=settings) as ours,
    ):
        memory, plain = peer.allocate(SHARD), np.ones(SHARD, np.uint8)
        peer.register(plain)
        memory[:] = 7
        segment, address = ours.open_segment(peer.name), int(memory.ctypes.data)
        view = segment.mapped(address + 5, 100)
        assert view is not None and (view == 7).all()
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        memory[5] = 8
        assert view[0] == 8, "the peer's own memory"
        assert segment.mapped(address, SHARD + 1) is None and segment.mapped(address - 1, 2) is None
        assert segment.mapped(int(plain.ctypes.data), 10) is None, "not a memory file"
        peer.unregister(memory)
        assert segment.mapped(address, 10) is None
        assert (view[1:] == 7).all()
        del view
