"""The P2P Store in one process: stores over a metadata store in memory, tcp and shared memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from mooncake_hpc.core.errors import (
    ConfigError,
    IntegrityError,
    ObjectExists,
    ObjectNotFound,
    ObjectReplaced,
    P2PError,
    SizeMismatch,
    TransferCancelled,
    TransferTimeout,
)
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.engine.remote_segment import Segment
from mooncake_hpc.p2p import P2PStore
from mooncake_hpc.p2p import fetcher as source
from mooncake_hpc.p2p.digests import ALGORITHMS, NATIVE_FROM
from mooncake_hpc.p2p.progress import Progress

Open = Callable[..., P2PStore]
SHARD = 1 << 16


@pytest.fixture
def opener(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[Open]:
    """Opens stores that see one another."""
    count = 0
    with ExitStack() as stack:

        def open_one(protocol: str = "tcp") -> P2PStore:
            nonlocal count
            count += 1
            name, space = f"127.0.0.1:{20000 + count}", f"memory://{request.node.name}"
            return stack.enter_context(P2PStore(name, space, protocol=protocol, settings=Settings(lease_ttl=1.0)))

        yield open_one


@pytest.fixture
def slow_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece takes 20 ms at least."""
    step = source.Worker._step

    def slowly(worker: source.Worker, segment: Segment) -> None:
        time.sleep(0.02)
        step(worker, segment)

    monkeypatch.setattr(source.Worker, "_step", slowly)


def content(nbytes: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.mark.parametrize("protocol", ["tcp", "shm", "auto"])
def test_there_and_back(opener: Open, protocol: str) -> None:
    trainer, reader = opener(protocol), opener(protocol)
    model = trainer.allocate(10 * SHARD + 77)
    model[:] = content(model.nbytes)
    manifest = trainer.register("model", model, shard_size=SHARD)
    replica = reader.get_replica("model", timeout=60)
    assert np.array_equal(replica.arrays[0], model)
    assert (manifest.shards, replica.progress.shards_done) == (11, 11)
    assert replica.progress.sources == {trainer.name: model.nbytes}
    (info,) = trainer.list()
    assert (info.name, info.size, info.replicas, info.shards) == ("model", model.nbytes, 2, 11)
    reader.delete_replica("model")
    assert trainer.list("mo")[0].holders == {trainer.name: 11} and trainer.list("x") == []
    trainer.unregister("model")
    assert trainer.list() == []


@pytest.mark.parametrize("size", [0, 1, SHARD - 1, SHARD, SHARD + 1])
def test_sizes(opener: Open, size: int) -> None:
    trainer, reader = opener(), opener()
    data = content(size)
    trainer.register("o", data, shard_size=SHARD)
    out = np.zeros(size, np.uint8)
    assert reader.get_replica("o", out, timeout=60).progress.size == size
    assert np.array_equal(out, data)


def test_a_shard_larger_than_the_object(opener: Open) -> None:
    trainer, reader = opener(), opener()
    trainer.register("o", data := content(1000), shard_size=1 << 30)
    assert np.array_equal(reader.get_replica("o", timeout=60).arrays[0], data)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_long_shards_over_the_wire(opener: Open, algorithm: str) -> None:
    """What is hashed natively, and otherwise; across borders of buffers; the last one is short."""
    trainer, reader = opener(), opener()
    parts = [content(3 * NATIVE_FROM + 77, 1), content(1000, 2), content(2 * NATIVE_FROM, 3)]
    manifest = trainer.register("o", parts, shard_size=NATIVE_FROM, algorithm=algorithm)
    replica = reader.get_replica("o", timeout=60)
    assert all(np.array_equal(one, other) for one, other in zip(replica.arrays, parts, strict=True))
    assert manifest.shards == replica.progress.shards_done == 6 and not replica.progress.wrong


@pytest.mark.parametrize("name", ["a/b", "..", "ü \n%41", "current", "x" * 500])
def test_odd_names(opener: Open, name: str) -> None:
    trainer, reader = opener(), opener()
    trainer.register(name, content(100))
    trainer.register(name + "2", content(100))
    reader.get_replica(name, timeout=60)
    assert [one.name for one in reader.list(name)] == sorted([name, name + "2"])


def test_lists_of_buffers_and_state_dicts(opener: Open) -> None:
    trainer, reader = opener(), opener()
    parts = [content(n, n) for n in (5, 0, 3 * SHARD, 70_000)]
    trainer.register("list", parts, shard_size=SHARD)
    out = [np.zeros_like(part) for part in parts]
    reader.get_replica("list", out, timeout=60)
    assert all(np.array_equal(a, b) for a, b in zip(parts, out, strict=True))

    state = {"w": np.arange(50_000, dtype=np.float32).reshape(100, 500), "b": np.arange(3), "s": np.float64([2.5])}
    trainer.register("state", state)
    ours: dict[str, Any] = {name: np.zeros_like(array) for name, array in reversed(state.items())}
    reader.get_replica("state", ours, timeout=60)
    assert all(np.array_equal(ours[name], state[name]) for name in state)
    reader.delete_replica("state")
    tensors = reader.get_replica("state", timeout=60).tensors()
    assert all(np.array_equal(tensors[n], state[n]) and tensors[n].dtype == state[n].dtype for n in state)


def test_many_small_tensors_share_shards(opener: Open) -> None:
    trainer, reader = opener(), opener()
    state = {f"t{i}": content(100 + i, i) for i in range(300)}
    assert trainer.register("small", state).shards == 2
    tensors = reader.get_replica("small", timeout=60).tensors()
    assert all(np.array_equal(tensors[name], state[name]) for name in state)


def test_wrong_receivers_are_refused(opener: Open) -> None:
    trainer, reader = opener(), opener()
    trainer.register("o", [content(100), content(50)])
    for out in (np.zeros(150, np.uint8), [np.zeros(50, np.uint8), np.zeros(100, np.uint8)], {"a": np.zeros(150)}):
        with pytest.raises(SizeMismatch, match="'o'"):
            reader.get_replica("o", out)
    frozen = np.zeros(100, np.uint8)
    frozen.flags.writeable = False
    with pytest.raises(SizeMismatch, match="read-only"):
        reader.get_replica("o", [frozen, np.zeros(50, np.uint8)])
    assert reader.list()[0].holders.keys() == {trainer.name}
    reader.get_replica("o", timeout=60)
    with pytest.raises(P2PError, match="already"):
        reader.get_replica("o")


def test_no_such_object(opener: Open) -> None:
    store = opener()
    with pytest.raises(ObjectNotFound, match="nothing"):
        store.get_replica("nothing")
    for drop in (store.unregister, store.delete_replica):
        with pytest.raises(ObjectNotFound):
            drop("nothing")
    for name in ("", "x" * 600):
        with pytest.raises(ConfigError):
            store.register(name, content(1))


@pytest.mark.slow
def test_waiting_for_an_object(opener: Open) -> None:
    trainer, reader = opener(), opener()
    data = content(SHARD)
    timer = threading.Timer(0.3, lambda: trainer.register("late", data))
    timer.start()
    assert np.array_equal(reader.get_replica("late", wait=60).arrays[0], data)
    timer.join()
    with pytest.raises(ObjectNotFound, match="within"):
        reader.get_replica("never", wait=0.2)


def test_many_readers_share(opener: Open) -> None:
    trainer = opener()
    model = content(40 * SHARD)
    trainer.register("model", model, shard_size=SHARD)
    results: list[Progress] = []
    readers = [opener() for _ in range(4)]
    for reader in readers:
        reader._holdings.host = reader.name  # as if on hosts of their own

    def read(store: P2PStore) -> None:
        replica = store.get_replica("model", timeout=90)
        assert np.array_equal(replica.arrays[0], model)
        results.append(replica.progress)

    threads = [threading.Thread(target=read, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert len(results) == 4
    assert sum(result.sources[trainer.name] for result in results) < 4 * model.nbytes
    assert trainer.list()[0].replicas == 5


def test_byte_range(opener: Open) -> None:
    trainer, reader = opener(), opener()
    data = content(5 * SHARD)
    trainer.register("o", data, shard_size=SHARD)
    for begin, end in ((0, 10), (SHARD, 2 * SHARD), (SHARD - 5, 3 * SHARD + 5), (0, data.nbytes), (7, 7)):
        out = np.zeros(end - begin, np.uint8)
        replica = reader.get_replica("o", out, byte_range=(begin, end), timeout=60)
        assert np.array_equal(out, data[begin:end])
        assert replica.progress.done <= end - begin + 2 * SHARD
    assert reader.list()[0].holders.keys() == {trainer.name}
    with pytest.raises(SizeMismatch):
        reader.get_replica("o", byte_range=(0, data.nbytes + 1))
    # the only holder, which is no source of its own
    assert np.array_equal(
        trainer.get_replica("o", byte_range=(SHARD - 5, 3 * SHARD)).arrays[0], data[SHARD - 5 : 3 * SHARD]
    )


def test_a_holder_of_an_older_version_does_not_replace_a_newer_one(opener: Open) -> None:
    """Both registered the same; then one of them made a new version of it."""
    first, second = opener(), opener()
    first.register("o", content(SHARD))
    second.register("o", content(SHARD))
    newer = first.register("o", content(2 * SHARD))
    with pytest.raises(ObjectExists):
        second.register("o", content(SHARD))
    assert first.list()[0].version == newer.version
    second.register("o", content(2 * SHARD))
    assert first.list()[0].replicas == 2


@pytest.mark.slow
def test_progress_deadline_and_cancel(opener: Open, slow_sources: None) -> None:
    trainer, reader = opener(), opener()
    data = content(20 * SHARD)
    trainer.register("o", data, shard_size=SHARD)
    seen: list[int] = []
    reader.get_replica("o", timeout=60, progress=lambda progress: seen.append(progress.done))
    assert seen == sorted(seen) and seen[-1] == data.nbytes
    reader.delete_replica("o")
    with pytest.raises(TransferTimeout, match="shards"):
        reader.get_replica("o", timeout=0.0)
    cancel = threading.Event()
    with pytest.raises(TransferCancelled):
        reader.get_replica("o", cancel=cancel, progress=lambda _: cancel.set())
    assert reader.list()[0].holders.keys() == {trainer.name}
    assert np.array_equal(reader.get_replica("o", timeout=60).arrays[0], data)


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [SHARD, NATIVE_FROM])
def test_wrong_bytes_come_from_elsewhere(opener: Open, shard_size: int) -> None:
    trainer, liar, reader = opener(), opener(), opener()
    data = content(12 * shard_size)
    trainer.register("o", data, shard_size=shard_size)
    theirs = np.zeros_like(data)
    liar.get_replica("o", theirs, timeout=60)
    theirs[::1000] ^= 1
    replica = reader.get_replica("o", timeout=60)
    assert np.array_equal(replica.arrays[0], data)
    assert set(replica.progress.wrong) <= {liar.name}
    trainer.unregister("o")
    reader.delete_replica("o")
    with pytest.raises(IntegrityError, match=liar.name):
        reader.get_replica("o", wait=30, timeout=60)


def test_two_trainers_with_one_name(opener: Open) -> None:
    first, second, reader = opener(), opener(), opener()
    data = content(3 * SHARD)
    version = first.register("o", data, shard_size=SHARD).version
    with pytest.raises(ObjectExists, match=version):
        second.register("o", content(3 * SHARD, 2), shard_size=SHARD)
    assert second.list()[0].holders.keys() == {first.name}
    assert second.register("o", data.copy(), shard_size=SHARD).version == version  # equal: one more holder
    assert second.list()[0].replicas == 2
    first.unregister("o")
    assert np.array_equal(reader.get_replica("o", wait=30, timeout=60).arrays[0], data)
    newer = content(SHARD, 3)
    assert first.register("o", newer, shard_size=SHARD, force=True).version != version
    reader.delete_replica("o")
    assert np.array_equal(reader.get_replica("o", timeout=60).arrays[0], newer)
    second.register("o", content(SHARD, 4), shard_size=SHARD, force=True)
    with pytest.raises(ObjectExists, match="force"):
        first.register("o", newer, shard_size=SHARD)
    assert first.register("o", newer, shard_size=SHARD, force=True).version == second.list()[0].version


def test_a_replica_keeps_an_object_alive(opener: Open) -> None:
    trainer, first, second = opener(), opener(), opener()
    data = content(3 * SHARD)
    trainer.register("o", data, shard_size=SHARD)
    first.get_replica("o", timeout=60)
    trainer.close()
    assert np.array_equal(second.get_replica("o", wait=30, timeout=60).arrays[0], data)
    assert second.list()[0].holders.keys() == {first.name, second.name}


@pytest.mark.slow
def test_registering_again_makes_a_new_version(opener: Open) -> None:
    trainer, reader, other = opener(), opener(), opener()
    old, new = content(30 * SHARD), content(30 * SHARD, 2)
    versions = [trainer.register("o", old, shard_size=SHARD).version]
    reader.get_replica("o", timeout=60)
    versions.append(trainer.register("o", new, shard_size=SHARD).version)
    assert versions[0] != versions[1]
    assert np.array_equal(other.get_replica("o", timeout=60).arrays[0], new)

    gone = threading.Event()

    def replace(_: Progress) -> None:
        if not gone.is_set():
            gone.set()
            trainer.register("o", old, shard_size=SHARD)

    other.delete_replica("o")
    out = np.zeros_like(new)
    try:
        other.get_replica("o", out, timeout=60, progress=replace)
    except (ObjectReplaced, ObjectNotFound):
        pass
    else:
        assert np.array_equal(out, new)
