"""Records, keys and values of others that no store of ours writes: they cost nobody anything but themselves."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from sandbox import wait_until

from mooncake_hpc.core.errors import ConfigError, MalformedRecord, ObjectNotFound
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.p2p import P2PStore
from mooncake_hpc.p2p.catalog import CURRENT, ObjectInfo
from mooncake_hpc.p2p.job import P2PConfig, run_list, run_trainer
from mooncake_hpc.p2p.mooncake_payload import PREFIX
from mooncake_hpc.p2p.report import list_lines

pytestmark = pytest.mark.slow

OBJECTS = "mooncake_hpc/p2p/object/"
HUGE = 10**10  # shards
SETTINGS = Settings(lease_ttl=1.0)
MODEL = np.random.default_rng(7).integers(0, 256, 40 * 65536 + 5, np.uint8)
GARBAGE = [
    "",
    "x",
    "[]",
    "null",
    "{}",
    '{"version":"v1"}',
    '{"version":1e999}',
    '{"shards":Infinity}',
    "[" * 100_000,
    '"\\ud800"',
]
KEYS = [
    "llm", "llm/", "llm/a/b/c/d", "llm/%ff/current", "%ff/current", "/current", "", "llm/v/", "llm/current/x",
    "%6C%6C%6D/current", "llm\x00/current", "🐍/current", "x" * 2000 + "/current",
]  # fmt: skip


@dataclass
class Scene:
    """A trainer of the object `llm`, a reader, and somebody who writes into the same store."""

    trainer: P2PStore
    reader: P2PStore
    evil: MetadataStore

    def record(self) -> tuple[str, dict[str, Any]]:
        """The key up to the holder's name, and the trainer's record."""
        ((key, text),) = [(k, t) for k, t in self.evil.list(f"{OBJECTS}llm/").items() if not k.endswith("/" + CURRENT)]
        return key.rpartition("/")[0] + "/", json.loads(text)

    def check(self) -> None:
        """The object is listed, and comes whole."""
        (found,) = self.reader.list("llm")
        assert found.name == "llm" and found.holders["trainer:1"] == found.shards
        replica = self.reader.get_replica("llm", timeout=30)
        assert np.array_equal(replica.arrays[0], MODEL)
        assert self.trainer.holders("llm")[0].segment == "reader:1"
        (found,) = self.trainer.list("llm")
        assert found.holders["reader:1"] == found.shards
        self.reader.delete_replica("llm")
        wait_until(lambda: not self.trainer.holders("llm"), 10, lambda: "the reader's record stays")


@contextmanager
def scene(metadata: str) -> Iterator[Scene]:
    with (
        open_store(metadata) as evil,
        P2PStore("trainer:1", metadata, protocol="tcp", settings=SETTINGS) as trainer,
        P2PStore("reader:1", metadata, protocol="tcp", settings=SETTINGS) as reader,
    ):
        trainer.register("llm", MODEL)
        yield Scene(trainer, reader, evil)


@pytest.fixture
def there(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[Scene]:
    with scene(f"memory://{request.node.name}") as made:
        yield made


def bad_records(there: Scene) -> dict[str, str]:
    """Of holders `evil<number>:1`: what a right one says, with one thing wrong."""
    key, record = there.record()
    changes: list[dict[str, Any]] = [
        {"shards": HUGE}, {"shards": HUGE, "have": "all"}, {"shards": -1}, {"shards": True}, {"have": "!"},
        {"have": "AA=="}, {"bases": []}, {"bases": [1 << 64]}, {"bases": [(1 << 64) - 1]}, {"bases": [-1]},
        {"bases": "x"}, {"segment": "trainer:1"}, {"segment": ""}, {"board": [1]}, {"board": [(1 << 64) - 8, 5]},
        {"board": [8, 0]}, {"sources": ["\0"]}, {"host": None}, {"generation": 7},
    ]  # fmt: skip
    texts = [json.dumps({**record, "segment": f"evil{number}:1", **change}) for number, change in enumerate(changes)]
    return {f"{key}evil{number}%3A1": text for number, text in enumerate([*texts, *GARBAGE])}


def test_bad_records_of_an_object(there: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """They are there before the pull, and come while it is under way; each is told of once."""
    bad = bad_records(there)
    for key, text in bad.items():
        there.evil.publish(key, text)
    there.check()
    for key, text in bad.items():
        there.evil.publish(key, text)
    there.check()
    told = [
        entry for entry in caplog.records if entry.levelname in ("WARNING", "ERROR") and "evil" in entry.getMessage()
    ]
    assert len(told) == len({entry.getMessage() for entry in told})
    assert len(bad) <= len(told) <= 2 * len(bad)  # by listings, and by those who follow the object
    assert not [entry for entry in caplog.records if entry.exc_info]


def test_claims_cost_nobody_memory(there: Scene) -> None:
    """A holder, and another object, of 10^10 shards."""
    key, record = there.record()
    there.evil.publish(f"{key}evil%3A1", json.dumps({**record, "segment": "evil:1", "shards": HUGE, "have": "all"}))
    summary = {"version": "v", "size": HUGE, "shards": HUGE, "shard_size": 1, "sizes": [HUGE]}
    there.evil.publish(f"{OBJECTS}other/{CURRENT}", json.dumps(summary))
    there.evil.publish(
        f"{OBJECTS}other/v/evil%3A1", json.dumps({**record, "segment": "evil:1", "shards": HUGE, "have": "all"})
    )
    tracemalloc.start()
    try:
        there.check()
        (other,) = there.reader.list("other")
        assert other.holders == {"evil:1": HUGE}
        assert tracemalloc.get_traced_memory()[1] < MODEL.nbytes + (32 << 20)
    finally:
        tracemalloc.stop()


def test_bad_objects_among_good_ones(there: Scene) -> None:
    """Their own readers get the one error, which names the key; all else goes on."""
    for number, text in enumerate(GARBAGE):
        there.evil.publish(f"{OBJECTS}llm-{number}/{CURRENT}", text)
        with pytest.raises(MalformedRecord, match=f"object/llm-{number}/current"):
            there.reader.get_replica(f"llm-{number}", timeout=5)
        there.evil.publish(f"{PREFIX}llm+{number}", text)
        with pytest.raises(MalformedRecord, match=rf"llm\+{number}"):
            there.reader.get_replica(f"llm+{number}", timeout=5)
    there.evil.publish(PREFIX + "llm", "x")  # ours comes first
    there.check()
    assert [one.name for one in there.reader.list()] == ["llm"]


def test_keys_that_are_none_of_ours(there: Scene) -> None:
    for key in KEYS:
        there.evil.publish(OBJECTS + key, '{"version":"v1"}')
    there.check()
    assert [one.name for one in there.reader.list()] == ["llm"]


def test_a_manifest_of_another_object_is_not_taken(there: Scene) -> None:
    """Under a key of one name lies the manifest of another: nobody is to hold the one under the other's name."""
    ((key, manifest),) = there.evil.list("mooncake_hpc/p2p/manifest/llm/").items()
    summary = there.evil.get(f"{OBJECTS}llm/{CURRENT}")
    there.evil.publish(key.replace("/llm/", "/copy/"), manifest)
    there.evil.publish(f"{OBJECTS}copy/{CURRENT}", summary or "")
    with pytest.raises(MalformedRecord, match="manifest/copy"):
        there.reader.get_replica("copy", timeout=5)
    with pytest.raises(ObjectNotFound):
        there.reader.get_replica("llm-", timeout=5)


@pytest.mark.parametrize("name", ["a\0b", "a\udcff", "", "x" * 5000])
def test_what_can_be_no_name(there: Scene, name: str) -> None:
    with pytest.raises(ConfigError):
        there.trainer.register(name, MODEL)
    with pytest.raises(ConfigError):
        there.trainer.register("tensors", {name: MODEL} if name else {"\udc80": MODEL})
    with pytest.raises(ConfigError):
        there.reader.get_replica(name)
    with pytest.raises(ConfigError):
        there.reader.engine.open_segment(name)
    if name:
        with pytest.raises(ConfigError):
            there.reader.list(name)


def test_a_list_tells_a_terminal_nothing() -> None:
    one = ObjectInfo("a\x1b[2Jb\n", "v", 1, 1, 1, (1,), {"h\x07:1": 1, "ü:1": 0})
    lines = list_lines([one])
    assert all(line.isprintable() for line in lines)
    assert "a\\x1b[2Jb\\n" in lines[1] and "h\\x07:1" in lines[2] and "ü:1" in lines[3]


def test_a_bad_current_value_while_the_object_is_held(there: Scene) -> None:
    """The trainer lost its name to garbage: its holders stay, and it withdraws cleanly."""
    there.evil.publish(f"{OBJECTS}llm/{CURRENT}", '{"version":')
    assert there.reader.list() == []
    with pytest.raises(MalformedRecord):
        there.reader.get_replica("llm", timeout=5)
    there.trainer.unregister("llm")
    assert there.evil.get(f"{OBJECTS}llm/{CURRENT}") == '{"version":'


def test_over_a_real_etcd(etcd: str, caplog: pytest.LogCaptureFixture) -> None:
    """The commands too: a trainer whose object has a like name, and the list."""
    with scene(etcd) as made:
        for key, text in bad_records(made).items():
            made.evil.publish(key, text)
        made.evil.publish(f"{OBJECTS}llm-of-another/{CURRENT}", '{"version":"v1"}')
        made.evil.publish(f"{OBJECTS}odd", "x")
        made.check()
        said: list[str] = []
        config = P2PConfig(
            metadata_server=etcd, local_server_name="other:1", name="llm-o", size=1000, idle=0.3, protocol="tcp"
        )
        assert run_trainer(config, SETTINGS, said.append) == 0
        assert "1000 bytes" in said[0] and said[-1] == "ALL DONE"
        said.clear()
        assert run_list(P2PConfig(metadata_server=etcd, name="llm"), SETTINGS, said.append) == 0
        assert "llm" in "".join(said) and "llm-of-another" not in "".join(said)
    assert not [entry for entry in caplog.records if entry.exc_info]
