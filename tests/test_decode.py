"""JSON of others, field by field replaced by what it should not be: a record within its limits, or the one error."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fuzz.values import NUMBERS, TEXTS, Raw, dump, places

from mooncake_hpc.control import client, server
from mooncake_hpc.control.directory import RpcRecord
from mooncake_hpc.core import decode
from mooncake_hpc.core.decode import Reader, warn_once
from mooncake_hpc.core.errors import MalformedRecord
from mooncake_hpc.p2p import catalog as catalogue
from mooncake_hpc.p2p.availability import Place
from mooncake_hpc.p2p.catalog import Holder, version_of
from mooncake_hpc.p2p.layout import Layout
from mooncake_hpc.p2p.manifest import Manifest, Part
from mooncake_hpc.p2p.mooncake_payload import Checkpoint
from mooncake_hpc.transports.base import Tables
from mooncake_hpc.transports.shm import handoff
from mooncake_hpc.wire import rpc_frames as frames
from mooncake_hpc.wire.descriptor import BufferDescriptor, DeviceDescriptor, SegmentDescriptor
from mooncake_hpc.wire.rdma_handshake import Hello
from mooncake_hpc.wire.rpc_frames import Kind

WORD = 1 << 64
GID = "00:00:00:00:00:00:00:00:00:00:ff:ff:0a:4d:00:01"
DEEP = [Raw("[" * 100_000), Raw('{"a":' * 100_000), Raw("[" * 5000 + "]" * 5000)]
SHAPES: list[Any] = [None, True, False, [], {}, [[]], {"": ""}, [None], [0, 0], {"a": [1]}, [{}], [True, True]]
ESCAPES = [Raw(r'"\ud800"'), Raw(r'"\udfff\ud800"'), Raw(r'"a\u0000b"'), Raw('"a\0b"'), Raw(r'"\x"'), Raw('"a')]
NASTY: list[Any] = [*map(Raw, NUMBERS), *TEXTS, *SHAPES, *ESCAPES, *DEEP, "x" * 100_000, Raw(""), Raw("tru")]
MANIFEST = Manifest(
    "a/b", "v1", (8, 0, 7), 4, "sha256", bytes(4 * 32), "tensors", (Part("x", "<f4", (2, 1)), Part("y"), Part("z"))
)
HOLDER = Holder("h:1", "g", "host", (1 << 47, 0, 4096), np.arange(4) % 2 > 0, Place(1 << 46, 7), ("other:1",), True)
SUMMARY = {"version": "v1", "size": 15, "shards": 4, "shard_size": 4, "sizes": [8, 0, 7]}


@dataclass
class Kept:
    """A kind of value: how it is read and then used, one that is right, and fields that must be right."""

    read: Callable[[str], object]
    right: dict[str, Any]
    numbers: tuple[str, ...] = ()  # `a.0.b`
    texts: tuple[str, ...] = ()


def use_segment(text: str) -> None:
    found = SegmentDescriptor.from_json(text, "it")
    Tables.of((b.address, b.address + b.length, b.readonly) for b in found.buffers)
    np.array([key for b in found.buffers for key in (*b.rkeys, *b.lkeys)], np.uint32)
    np.array([1 << len(found.devices)], np.int64)  # as a rail's bit
    assert 0 <= found.tcp_data_port < 65536
    assert all(len(bytes.fromhex(device.gid.replace(":", ""))) in (0, 16) for device in found.devices)
    found.to_json().encode()
    assert found.spoken


def use_manifest(text: str) -> None:
    found = Manifest.from_json(text, "it")
    assert found.shards <= len(text) and found.size < 1 << 62
    np.array([found.span(shard) for shard in range(found.shards)], np.int64)
    assert Manifest.from_json(found.to_json(), "it") == found


def use_holder(text: str) -> None:
    found = Holder.from_json(text, "it", "h:1", MANIFEST)
    extents = Layout(list(zip(found.bases, MANIFEST.sizes, strict=True))).extents(0, MANIFEST.size)
    np.array(extents, np.uint64)
    np.array([0 if found.board is None else found.board.address], np.uint64)
    assert len(found.have) == MANIFEST.shards
    found.to_json().encode()


def use_checkpoint(text: str) -> None:
    found = Checkpoint.from_json(text, "it")
    np.array([place for shard in found.shards for _, place in shard.places], np.uint64)
    assert found.manifest().shards <= len(text) and found.holders() is not None


def use_reply(text: str) -> None:
    found = handoff.read_reply(text, "it")
    Tables.of((address, address + nbytes, readonly) for address, nbytes, readonly in found.buffers)
    np.array([address for _, address, _ in found.files], np.uint64)


SEGMENT = SegmentDescriptor(
    "a:1",
    (BufferDescriptor(1 << 47, 4096, "cpu:0", True, (1, 2), (3, 4)), BufferDescriptor(WORD - 4096, 4096, "cpu:1")),
    "10.0.0.1", 4242, 2, "g", "mooncake-1-ff", (DeviceDescriptor("mlx5_0", GID, 7),), {"cpu:0": [["mlx5_0"], []]},
)  # fmt: skip
SHARDS = [{"size": 4, "gold": [{"segment_name": "a:1", "offset": 1 << 40}], "replica_list": None}, {"size": 11}]
OURS = {"generation": "g"}
KINDS = {
    "segment": Kept(
        use_segment, json.loads(SEGMENT.to_json()),
        ("buffers.0.addr", "buffers.1.length", "buffers.0.rkey.1", "tcp_data_port", "devices.0.lid",
         "mooncake_hpc.readonly.0"),
        ("name", "buffers.0.name", "tcp_data_host", "devices.0.name", "mooncake_hpc.shm_socket"),
    ),
    "rpc": Kept(
        lambda text: RpcRecord.from_json(text, "it"),
        {"ip_or_host_name": "10.0.0.1", "rpc_port": 15000, "mooncake_hpc": OURS}, ("rpc_port",),
        ("ip_or_host_name", "mooncake_hpc.generation"),
    ),
    "probe": Kept(
        lambda text: server._read_probe(text, "it"), {"fence": "0123456789abcd", "timeout": 1.5}, (), ("fence",)
    ),
    "probed": Kept(
        lambda text: client._read_probe(text, "it"),
        {"status": "success", "fenced": True, "mooncake_hpc": OURS}, (), ("mooncake_hpc.generation",),
    ),
    "notify": Kept(lambda text: server._read_notify(text, "it"), {"name": "a:1", "notify_msg": "b"}, (), ("name",)),
    "notified": Kept(lambda text: client._read_notify(text, "it"), {"name": "", "notify_msg": "success"}),
    "handshake": Kept(
        lambda text: Hello.from_json(text, "it").to_json(),
        Hello("a:1@rxe0", "b:1@rxe1", (17, 18), 3, bytes.fromhex(GID.replace(":", "")), False, 4096, "no").to_json(),
        ("qp_num.1", "local_lid", "mooncake_hpc.mtu"), ("local_nic_path", "peer_nic_path", "local_gid"),
    ),
    "files wanted": Kept(lambda text: handoff.read_request(text, "it"), {"have": [1, 2]}, ("have.1",)),
    "files": Kept(
        use_reply,
        {"version": 3, "page": True, "files": [[1, 1 << 40, 4096], [2, WORD - 4096, 4096]], "new": [2],
         "buffers": [[1 << 40, 100, False]]},
        ("version", "files.0.0", "files.1.1", "files.1.2", "new.0", "buffers.0.0", "buffers.0.1"),
    ),
    "manifest": Kept(
        use_manifest, json.loads(MANIFEST.to_json()),
        ("format", "sizes.0", "shard_size", "parts.0.2.0", "parts.0.3"),
        ("name", "version", "algorithm", "digests", "parts.1.0"),
    ),
    "holder": Kept(
        use_holder, json.loads(HOLDER.to_json()), ("bases.0", "shards", "board.0", "board.1"),
        ("segment", "have", "sources.0"),
    ),
    "counted holder": Kept(
        lambda text: catalogue._count(text, "it", "h:1", 4), json.loads(HOLDER.to_json()), ("shards",),
        ("segment", "have"),
    ),
    "current": Kept(
        lambda text: version_of(text, "it"), SUMMARY, ("size", "shards", "shard_size", "sizes.1"), ("version",)
    ),
    "checkpoint": Kept(
        use_checkpoint, {"name": "a/b", "size": 15, "size_list": [15], "max_shard_size": 4, "shards": SHARDS},
        ("size_list.0", "shards.0.size", "shards.0.gold.0.offset"), ("name", "shards.0.gold.0.segment_name"),
    ),
}  # fmt: skip
NO_NUMBERS = [Raw(n) for n in NUMBERS if n != "-0" and (not n.isdecimal() or int(n[:4000]) >= WORD or n == "00")]
NO_NUMBERS += [Raw("true"), Raw('"1"'), Raw("[1]"), Raw("{}"), Raw("-1"), Raw("1.5"), Raw("1.0"), *DEEP]
NO_TEXTS = [Raw("1"), Raw("true"), Raw("[]"), Raw("{}"), *ESCAPES, *DEEP, "x" * 100_000]


def replaced(value: dict[str, Any], path: str, by: Any) -> str:
    """The JSON of `value` with another value at `path`."""
    value = copy.deepcopy(value)
    here: Any = value
    *way, last = [int(step) if step.isdecimal() else step for step in path.split(".")]
    for step in way:
        here = here[step]
    assert here[last] is not None
    here[last] = by
    return dump(value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_value_is_read_and_unknown_fields_are_ignored(kind: str) -> None:
    kept = KINDS[kind]
    kept.read(json.dumps(kept.right))
    kept.read(json.dumps({**kept.right, "later": {"deep": [[[{}]]]}, "": None}))


@pytest.mark.parametrize("kind", KINDS)
def test_any_value_anywhere_gives_a_record_or_the_one_error(kind: str) -> None:
    kept = KINDS[kind]
    texts = [dump(value) for value in NASTY]
    for at in range(len(places(kept.right))):
        for value in NASTY:
            changed = copy.deepcopy(kept.right)
            here, key = places(changed)[at]
            here[key] = value
            texts.append(dump(changed))
    refused = 0
    for text in texts:
        try:
            kept.read(text)
        except MalformedRecord as error:
            assert str(error).startswith("it holds no "), error
            assert len(str(error)) < 3000
            refused += 1
    assert refused > len(NASTY) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_field_gives_a_record_or_the_one_error(kind: str) -> None:
    kept = KINDS[kind]
    for at in range(len(places(kept.right))):
        changed = copy.deepcopy(kept.right)
        here, key = places(changed)[at]
        del here[key]
        try:
            kept.read(dump(changed))
        except MalformedRecord as error:
            assert str(error).startswith("it holds no ")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_or_no_text_is_refused_and_the_field_named(kind: str) -> None:
    kept = KINDS[kind]
    for paths, wrong in ((kept.numbers, NO_NUMBERS), (kept.texts, NO_TEXTS)):
        for path in paths:
            for value in wrong:
                text = replaced(kept.right, path, value)
                with pytest.raises(MalformedRecord, match="it holds no "):
                    kept.read(text)
                    pytest.fail(f"taken: {text[:200]}")


def test_the_field_is_named() -> None:
    with pytest.raises(MalformedRecord, match=r"key 'k' holds no segment descriptor.*\$\.buffers\[1\]\.addr"):
        SegmentDescriptor.from_json(replaced(KINDS["segment"].right, "buffers.1.addr", "x"), "key 'k'")


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("segment", "buffers.1.length", 4097), ("segment", "buffers.0.addr", WORD - 1),
        ("segment", "tcp_data_port", 65536), ("segment", "devices.0.lid", 65536),
        ("segment", "buffers.0.rkey.0", 1 << 32),
        ("rpc", "rpc_port", 0),
        ("rpc", "rpc_port", 65536), ("handshake", "qp_num.0", 1 << 24), ("handshake", "local_gid", "fe80::1"),
        ("files", "files.1.2", 4097), ("files", "files.0.0", 2), ("files", "new.0", 9), ("files", "buffers.0.1", WORD),
        ("holder", "bases.0", WORD - 4), ("holder", "shards", 10**10), ("holder", "board.0", WORD - 8),
        ("holder", "have", "all!"), ("holder", "have", "AAAA"), ("holder", "segment", "other:1"),
        ("counted holder", "shards", 10**10), ("current", "shards", 10**10), ("current", "version", "v/1"),
        ("manifest", "sizes.0", 10**12), ("manifest", "shard_size", 1), ("manifest", "digests", "A" * 40),
        ("manifest", "algorithm", "md4"), ("manifest", "parts.0.1", "<f8"), ("manifest", "parts.0.1", "O"),
        ("manifest", "parts.0.1", "V1000000000"), ("manifest", "parts.0.2", [3]), ("manifest", "parts.1.0", "x"),
        ("manifest", "parts.0.2", [1 << 40, 1 << 40]), ("checkpoint", "shards.0.gold.0.offset", WORD - 3),
        ("checkpoint", "shards.0.size", 5), ("probe", "fence", "x" * 65), ("probe", "fence", ""),
    ],
)  # fmt: skip
def test_values_that_contradict_one_another_or_go_too_far(kind: str, path: str, value: Any) -> None:
    kept = KINDS[kind]
    with pytest.raises(MalformedRecord):
        kept.read(replaced(kept.right, path, value))


def test_what_versions_of_mooncake_write_is_read() -> None:
    oldest = '{"buffers":null,"name":"a:1","protocol":"tcp"}\n'
    assert SegmentDescriptor.from_json(oldest, "it") == SegmentDescriptor("a:1")
    several = '{"buffers":[{"addr":4096,"length":1,"name":"x","protocol":"tcp"}],"name":"a","protocol":["tcp","rdma"]}'
    assert SegmentDescriptor.from_json(several, "it").buffers == (BufferDescriptor(4096, 1, "x"),)
    twice = '{"ip_or_host_name":"a","rpc_port":1,"rpc_port":2}'
    assert RpcRecord.from_json(twice, "it").port == 2  # as its JSON library
    with pytest.raises(MalformedRecord):
        RpcRecord.from_json('{"ip_or_host_name":"a","rpc_port":"x","rpc_port":2}', "it")


def test_a_segment_of_many_devices() -> None:
    many = {"gid": GID, "lid": 1, "name": "d"}
    for count in (62, 63):
        buffer = {"addr": 4096, "length": 4096, "name": "cpu:0", "lkey": [1] * count, "rkey": [1] * count}
        text = json.dumps(
            {"name": "a", "buffers": [buffer], "devices": [{**many, "name": f"d{i}"} for i in range(count)]}
        )
        if count == 62:
            use_segment(text)
        else:
            with pytest.raises(MalformedRecord, match="length <= 62"):
                use_segment(text)


def test_claims_allocate_nothing() -> None:
    """Of a record's 10^10 shards, or a manifest's 10^12 bytes, no array is made."""
    claims = [("holder", "shards"), ("counted holder", "shards"), ("current", "shards"), ("manifest", "sizes.0")]
    tracemalloc.start()
    try:
        for kind, path in claims:
            for value in (10**10, 10**15, (1 << 63) - 1):
                text = replaced(KINDS[kind].right, path, value).replace('"have":"UA=="', '"have":"all"')
                with pytest.raises(MalformedRecord):
                    KINDS[kind].read(text)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", Kind)
def test_frames_hold_json_or_are_malformed(kind: Kind) -> None:
    for value in NASTY:
        with contextlib.suppress(frames.MalformedFrame):
            found = frames.decode(bytes([kind]) + dump(value).encode("utf-8", "surrogatepass"))
            assert found.kind is kind and found.text == dump(value)


def test_a_text_above_its_limit_is_not_parsed() -> None:
    read = Reader(int, "number", 10)
    assert read(b"1234567890", "it") == 1234567890
    with pytest.raises(MalformedRecord, match="it holds no number: 11 bytes are above the limit of 10"):
        read("12345678901", "it")


def test_a_nul_is_found_only_where_there_is_one() -> None:
    read = Reader(str, "text")
    assert read(r'"\\u0000 \\\\u0000"', "it") == r"\u0000 \\u0000"
    for text in (r'"\u0000"', r'"\\\u0000"', r'"a\\\\\u0000"'):
        with pytest.raises(MalformedRecord, match="NUL"):
            read(text, "it")


def test_what_is_left_out_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "REMEMBERED", 3)
    monkeypatch.setattr(decode, "_told", {})
    log = logging.getLogger("test")
    for text in "aabacadaaea":
        warn_once(log, ValueError(text * 10))
    said = [record.getMessage()[-1] for record in caplog.records]
    assert said == ["a", "b", "c", "d", "a", "e"]
