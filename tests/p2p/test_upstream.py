"""Objects as the original's P2P Store publishes them; `test_interop_p2p` reads one from the original itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mooncake_hpc import TransferEngine
from mooncake_hpc.core.errors import (
    MetadataError,
    ObjectNotFound,
    SizeMismatch,
    TransferCancelled,
    TransferTimeout,
)
from mooncake_hpc.metadata.memory import MemoryStore
from mooncake_hpc.p2p import P2PStore
from mooncake_hpc.p2p.fetch_files import fetch_path
from mooncake_hpc.p2p.mooncake_payload import PREFIX, Checkpoint

SHARD = 1 << 16
SIZES = (3 * SHARD + 100, 1, 2 * SHARD)


def value(name: str, sizes: tuple[int, ...], places: list[tuple[str, list[int]]], replicas: int = 0) -> str:
    """As the original writes it: `places` are (segment, address of each buffer); the last `replicas` are replicas."""
    shards = []
    for number, size in enumerate(sizes):
        for at in range(0, size, SHARD):
            found = [{"segment_name": segment, "offset": bases[number] + at} for segment, bases in places]
            gold, copies = found[: len(found) - replicas], found[len(found) - replicas :]
            shards.append({"size": min(SHARD, size - at), "gold": gold or None, "replica_list": copies or None})
    whole = {"name": name, "size": sum(sizes), "size_list": sizes, "max_shard_size": SHARD, "shards": shards or None}
    return json.dumps(whole)


class Scene:
    """Nodes that hold an object without a store of ours, and a store that reads it."""

    def __init__(self, stack: ExitStack, space: str) -> None:
        self._stack, self.space = stack, space
        self.metadata = stack.enter_context(MemoryStore(space))
        self.reader = stack.enter_context(P2PStore("reader:1", f"memory://{space}", protocol="tcp"))
        rng = np.random.default_rng(3)
        self.buffers = [rng.integers(0, 256, size, np.uint8) for size in SIZES]

    def holder(self, name: str, wrong: bool = False) -> tuple[str, list[int]]:
        """A node that holds the buffers; where."""
        engine = self._stack.enter_context(TransferEngine(name, f"memory://{self.space}", protocol="tcp"))
        copies = [engine.allocate(size) for size in SIZES]
        for copy, buffer in zip(copies, self.buffers, strict=True):
            copy[:] = 0 if wrong else buffer
        return name, [int(copy.ctypes.data) for copy in copies]

    def publish(self, text: str, name: str = "foo/bar") -> None:
        self.metadata.publish(PREFIX + name, text)

    def check(self, arrays: list[Any]) -> None:
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(arrays, self.buffers, strict=True))


@pytest.fixture
def scene(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(stack, request.node.name)


def test_there_and_listed(scene: Scene) -> None:
    scene.publish(value("foo/bar", SIZES, [scene.holder("gold:1")]))
    replica = scene.reader.get_replica("foo/bar", timeout=60)
    scene.check(replica.arrays)
    assert replica.progress.sources == {"gold:1": sum(SIZES)} and replica.manifest.algorithm == "none"
    (info,) = scene.reader.list("foo")
    assert (info.name, info.version, info.size, info.shards) == ("foo/bar", "original", sum(SIZES), 7)
    assert info.holders == {"gold:1": 7}, "an object that cannot be verified is not offered on"
    scene.reader.delete_replica("foo/bar")
    out = [np.zeros(size, np.uint8) for size in SIZES]
    scene.check(scene.reader.get_replica("foo/bar", out, timeout=60).arrays)


def test_all_places_share_the_load_and_dead_ones_are_left(scene: Scene) -> None:
    """The original never tries the last place, here the only one that lives besides the first replica."""
    gold, replica = scene.holder("gold:1"), scene.holder("replica:1")
    scene.publish(value("foo/bar", SIZES, [gold, ("gone:1", [4096] * 3), replica], replicas=2))
    result = scene.reader.get_replica("foo/bar", timeout=60)
    scene.check(result.arrays)
    assert set(result.progress.sources) == {"gold:1", "replica:1"}
    assert set(result.progress.failures) == {"gone:1"}


def test_addresses_that_a_place_has_given_up(scene: Scene) -> None:
    gold = scene.holder("gold:1")
    scene.publish(value("foo/bar", SIZES, [("gold:1", [4096] * 3), gold]))
    scene.check(scene.reader.get_replica("foo/bar", timeout=60).arrays)
    scene.reader.delete_replica("foo/bar")
    scene.publish(value("foo/bar", SIZES, [("gold:1", [4096] * 3)]))
    with pytest.raises(ObjectNotFound, match="gold:1"):
        scene.reader.get_replica("foo/bar", timeout=60)
    scene.publish(value("foo/bar", SIZES, []))
    with pytest.raises(ObjectNotFound, match="0 places"):
        scene.reader.get_replica("foo/bar", timeout=60)


def test_ranges_files_and_sizes(scene: Scene, tmp_path: Path) -> None:
    scene.publish(value("foo/bar", SIZES, [scene.holder("gold:1")]))
    whole = np.concatenate(scene.buffers)
    for begin, end in ((0, 1), (SHARD - 1, 4 * SHARD), (5, 5), (0, whole.nbytes)):
        (part,) = scene.reader.get_replica("foo/bar", byte_range=(begin, end), timeout=60).arrays
        assert np.array_equal(part, whole[begin:end])
    fetch_path(scene.reader, "foo/bar", str(tmp_path / "out"), timeout=60)
    assert (tmp_path / "out").read_bytes() == whole.tobytes()
    scene.reader.delete_replica("foo/bar")
    with pytest.raises(SizeMismatch):
        scene.reader.get_replica("foo/bar", np.zeros(whole.nbytes, np.uint8))


@pytest.mark.slow
def test_deadline_cancel_and_wait(scene: Scene) -> None:
    holder = scene.holder("gold:1")
    scene.publish(value("foo/bar", SIZES, [holder]))
    with pytest.raises(TransferTimeout):
        scene.reader.get_replica("foo/bar", timeout=0.0)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(TransferCancelled):
        scene.reader.get_replica("foo/bar", cancel=cancel)
    timer = threading.Timer(0.3, lambda: scene.publish(value("late", SIZES, [holder]), "late"))
    timer.start()
    scene.check(scene.reader.get_replica("late", wait=30).arrays)
    timer.join()


def test_ours_comes_before_the_originals(scene: Scene) -> None:
    scene.publish(value("foo/bar", SIZES, [scene.holder("gold:1", wrong=True)]))
    with P2PStore("trainer:1", f"memory://{scene.space}", protocol="tcp") as trainer:
        trainer.register("foo/bar", scene.buffers)
        scene.check(scene.reader.get_replica("foo/bar", timeout=60).arrays)


def test_an_empty_object(scene: Scene) -> None:
    scene.publish(value("empty", (), []), "empty")
    assert scene.reader.get_replica("empty", timeout=60).arrays == []


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"name": "x", "size_list": [5], "shards": [{"size": 4}]}',
             '{"name": "x", "size_list": [-1, 2], "shards": [{"size": 1}]}',
             '{"name": "x", "size_list": [4], "shards": [{"size": 4, "gold": [{"offset": 1}]}]}'],
)  # fmt: skip
def test_values_that_are_no_object(scene: Scene, text: str) -> None:
    with pytest.raises(MetadataError, match="key k"):
        Checkpoint.from_json(text, "key k")
    scene.publish(text)
    with pytest.raises(MetadataError):
        scene.reader.get_replica("foo/bar")
    assert scene.reader.list() == []
