"""RPC frames, the control server under bad clients, and the directory."""

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from mooncake_hpc.control import client, server
from mooncake_hpc.control.directory import Directory, RpcRecord
from mooncake_hpc.control.server import ControlServer, Handlers, Notifications, open_rpc_listener
from mooncake_hpc.core.address import bind_listener, is_local, join
from mooncake_hpc.core.errors import (
    ConfigError,
    MetadataError,
    MetadataUnavailable,
    NameInUse,
    PeerLost,
    SegmentNotFound,
    TransferError,
)
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.metadata.memory import MemoryStore
from mooncake_hpc.wire import rpc_frames as frames
from mooncake_hpc.wire.descriptor import BufferDescriptor, SegmentDescriptor
from mooncake_hpc.wire.rpc_frames import Kind

pytestmark = pytest.mark.usefixtures("no_leaks")

SETTINGS = Settings(handshake_connect_timeout=2.0)


@contextmanager
def serving(handlers: Handlers | None = None, host: str = "127.0.0.1", **settings: Any) -> Iterator[str]:
    """A control server's address."""
    known = replace(SETTINGS, **settings)
    running = ControlServer(open_rpc_listener("x", host, known), handlers or Handlers(), known)
    try:
        yield join(host, running.port)
    finally:
        running.stop()


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), 5)


def talk(address: str, data: bytes) -> bytes:
    """All that the server answers to raw bytes."""
    answer = b""
    with connect(address) as raw:
        raw.sendall(data)
        with suppress(ConnectionResetError):
            while piece := raw.recv(65536):
                answer += piece
                raw.shutdown(socket.SHUT_WR)
    return answer


def test_frame_layout_is_the_originals() -> None:
    assert frames.encode(Kind.PROBE, "{}\n") == b"\x04\0\0\0\0\0\0\0\x03{}\n"
    assert frames.encode(Kind.CONNECTION, "{}", old=True) == b"\x02\0\0\0\0\0\0\0{}"
    assert frames.dumps({"b": 1, "a": [None]}) == '{"a":[null],"b":1}\n'


@pytest.mark.parametrize("body", [b"", b"\x03", b"\x03{", b"\x80{}", b"\xff{}", b"{", b"\x02\xff\xfe", b"\x04{}"])
def test_malformed_bodies(body: bytes) -> None:
    with pytest.raises(frames.MalformedFrame):
        frames.decode(body)


def test_deeply_nested_json_is_malformed() -> None:
    with pytest.raises(frames.MalformedFrame):
        frames.decode(b"\x03" + b"[" * 500_000)


def test_old_protocol_is_a_connection() -> None:
    assert frames.decode(b'{"qp_num":[1]}') == frames.Frame(Kind.CONNECTION, '{"qp_num":[1]}', old=True)


def test_probe_tells_the_generation_and_fences() -> None:
    asked: list[tuple[str, float]] = []

    def fence(connection: str, timeout: float) -> bool:
        asked.append((connection, timeout))
        return connection == "dead"

    with serving(Handlers(generation="g1", fence=fence)) as address:
        assert client.probe(address, 5, SETTINGS) == client.ProbeReply("g1", False)
        assert client.probe(address, 5, SETTINGS, "dead", 0.5) == client.ProbeReply("g1", True)
        assert client.probe(address, 5, SETTINGS, "alive", 1e9) == client.ProbeReply("g1", False)
    assert asked == [("dead", 0.5), ("alive", server.MAX_FENCE_TIMEOUT)]


def test_notifications_arrive_in_order_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_NOTIFICATIONS", 2)
    box = Notifications()
    with serving(Handlers(notify=box.put)) as address:
        client.notify(address, "me", "first ✓", 5, SETTINGS)
        client.notify(address, "me", "second", 5, SETTINGS)
        with pytest.raises(TransferError, match="refused"):
            client.notify(address, "me", "third", 5, SETTINGS)
        assert box.take() == [("me", "first ✓"), ("me", "second")]
        assert box.take() == []
        client.notify(address, "me", "fourth", 5, SETTINGS)
        assert box.take() == [("me", "fourth")]


def test_notifications_are_bounded_in_bytes_and_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Notifications()
    monkeypatch.setattr(server, "MAX_NOTIFICATION_BYTES", 10_000)
    assert not box.put("a", "🐍" * 2500)  # 4 bytes each in memory
    assert box.put("a", "x" * 2500) and box.put("", "y" * 5000) and not box.put("a", "z" * 5000)
    assert [text[:1] for _, text in box.take()] == ["x", "y"]
    assert box.put("a", "z" * 9000)
    monkeypatch.setattr(server, "NOTIFICATION_LIFE_S", -1.0)
    assert box.put("a", "w" * 9000)  # in place of what nobody took
    assert box.take() == []


def test_texts_that_requests_bring_are_not_kept() -> None:
    """Of Probe and Notify frames of a megabyte each, of the kinds that are refused, and of those that are answered."""
    known: list[str] = []

    def fence(connection: str, _timeout: float) -> bool:
        known.append(connection)
        return True

    with serving(Handlers(fence=fence, notify=Notifications().put)) as address:
        long = "x" * 1_000_000
        texts = [
            (Kind.PROBE, json.dumps({"fence": long, "timeout": 0})), (Kind.PROBE, json.dumps({"later": long})),
            (Kind.NOTIFY, json.dumps({"name": long, "notify_msg": "a"})), (Kind.CONNECTION, json.dumps({"a": long})),
        ]  # fmt: skip
        tracemalloc.start()
        try:
            for _ in range(20):
                for kind, text in texts:
                    talk(address, frames.encode(kind, text))
            assert tracemalloc.get_traced_memory()[0] < 8 << 20  # of the last few, perhaps
        finally:
            tracemalloc.stop()
    assert known == []


@pytest.mark.parametrize("name", ["a\0b", "a\udcff", "x" * 600])
def test_a_client_refuses_texts_that_a_peer_would_not_take(name: str) -> None:
    with serving() as address:
        with pytest.raises(ConfigError, match="sender's name"):
            client.notify(address, name, "text", 5, SETTINGS)
        with pytest.raises(ConfigError, match="notification"):
            client.notify(address, "me", "\ud800", 5, SETTINGS)
        client.notify(address, "me", "a\0b" * 1000, 5, SETTINGS)


def test_rdma_handshake_is_refused_politely_in_both_protocols() -> None:
    request = json.dumps({"local_nic_path": "a@b", "peer_nic_path": "c@d", "qp_num": [1]})
    with serving() as address:
        reply = json.loads(client.exchange(address, Kind.CONNECTION, json.loads(request), 5, SETTINGS))
        old = talk(address, frames.encode(Kind.CONNECTION, request, old=True))
    assert "RDMA" in reply["reply_msg"]
    assert struct.unpack("<Q", old[:8])[0] == len(old) - 8
    assert json.loads(old[8:]) == reply  # no kind byte


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 0),
        struct.pack("<Q", 1 << 62) + b"x" * 1000,
        struct.pack("<Q", (1 << 20) + 1) + b"\x03{}",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        frames.encode(Kind.PROBE, "{} x"),
        frames.encode(Kind.PROBE, "[]"),
        frames.encode(Kind.NOTIFY, "null"),
        frames.encode(Kind.PROBE, '{"fence":"a","timeout":"x"}'),
        frames.encode(Kind.PROBE, '{"fence":"a","timeout":NaN}'),
    ],
)
def test_garbage_is_closed_without_a_word(data: bytes) -> None:
    with serving() as address:
        assert talk(address, data) == b""
        assert client.probe(address, 5, SETTINGS)


def test_a_handler_that_raises_costs_its_own_connection() -> None:
    def broken(_connection: str, _timeout: float) -> bool:
        raise RuntimeError("injected")

    with serving(Handlers(fence=broken)) as address:
        with pytest.raises(PeerLost, match="no reply"):
            client.probe(address, 5, SETTINGS, "x", 1)
        assert client.probe(address, 5, SETTINGS)


def test_silent_and_slow_clients_block_nobody() -> None:
    with serving() as address:
        clients = [connect(address) for _ in range(server.MAX_CONNECTIONS + 20)]
        for raw in clients[::2]:
            raw.sendall(b"\x04\0")
        started = time.monotonic()
        for _ in range(10):
            client.probe(address, 5, SETTINGS)
        assert time.monotonic() - started < 3
        assert threading.active_count() < server.MAX_CONNECTIONS + 10
        for raw in clients:
            raw.close()


def test_silent_client_is_dropped_after_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLIENT_TIMEOUT", 0.2)
    with serving() as address, connect(address) as raw:
        raw.sendall(b"\x04\0\0\0\0\0\0\0\x03")
        assert raw.recv(1) == b""


def test_work_in_progress_is_never_cut_to_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    release = threading.Event()
    replies: list[client.ProbeReply] = []

    def ask() -> None:
        replies.append(client.probe(address, 5, SETTINGS, "slow", 5))

    with serving(Handlers(fence=lambda _c, timeout: release.wait(timeout))) as address:
        askers = [threading.Thread(target=ask) for _ in range(2)]
        for asker in askers:
            asker.start()
        time.sleep(0.2)
        with pytest.raises(PeerLost):
            client.probe(address, 5, SETTINGS)
        release.set()
        for asker in askers:
            asker.join()
    assert [reply.fenced for reply in replies] == [True, True]


def test_stop_is_prompt_with_clients_connected() -> None:
    listener = open_rpc_listener("x", "127.0.0.1", SETTINGS)
    running = ControlServer(listener, Handlers(), SETTINGS)
    with connect(f"127.0.0.1:{running.port}"):
        started = time.monotonic()
        running.stop()
        running.stop()
        assert time.monotonic() - started < 3
    with pytest.raises(PeerLost, match="cannot connect"):
        client.probe(f"127.0.0.1:{running.port}", 1, SETTINGS)


def test_rpc_port_rule() -> None:
    with bind_listener("127.0.0.1", [0]) as taken:
        port = taken.getsockname()[1]
        with open_rpc_listener(f"a:{port}", "127.0.0.1", SETTINGS) as listener:
            assert 15000 <= listener.getsockname()[1] <= 17000
        legacy = replace(SETTINGS, legacy_rpc_port=True)
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--local_server_name"):
            open_rpc_listener(f"a:{port}", "127.0.0.1", legacy)
        with open_rpc_listener(f"a:{port}", "127.0.0.1", legacy, peer_to_peer=True) as listener:
            assert 15000 <= listener.getsockname()[1] <= 17000
        single = replace(SETTINGS, rpc_port_min=port, rpc_port_max=port)
        with pytest.raises(ConfigError, match="MC_MIN_RPC_PORT"):
            open_rpc_listener("a", "127.0.0.1", single)
    with pytest.raises(ConfigError, match="above MC_MAX_RPC_PORT"):
        open_rpc_listener("a", "127.0.0.1", replace(SETTINGS, rpc_port_min=17000, rpc_port_max=15000))


@contextmanager
def answering(data: bytes, hold: float = 0.0) -> Iterator[str]:
    """A peer that accepts one connection, sends `data`, and closes after `hold` seconds."""

    def run() -> None:
        raw, _ = listener.accept()
        with raw:
            raw.recv(65536)
            raw.sendall(data)
            released.wait(hold)

    released = threading.Event()
    with bind_listener("127.0.0.1", [0]) as listener:
        thread = threading.Thread(target=run)
        thread.start()
        yield join("127.0.0.1", listener.getsockname()[1])
        released.set()
        thread.join()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no reply"),
        (b"\x04\0\0\0\0\0\0\0\x03{", "no reply"),
        (struct.pack("<Q", 1 << 40), "is no frame"),
        (frames.encode(Kind.NOTIFY, "{}"), "another kind"),
        (frames.encode(Kind.PROBE, "{}", old=True), "another kind"),
        (frames.encode(Kind.PROBE, '{"status":"no"}'), "answered"),
        (frames.encode(Kind.PROBE, "null"), "answered"),
    ],
)
def test_client_names_address_and_cause(data: bytes, text: str) -> None:
    with answering(data) as address, pytest.raises(PeerLost, match=f"{address}.*{text}"):
        client.probe(address, 5, SETTINGS)


def test_client_deadline() -> None:
    started = time.monotonic()
    with answering(b"\x04\0\0", hold=5) as address, pytest.raises(client.Unanswered, match=r"within 0\.2 s"):
        client.probe(address, 0.2, SETTINGS)
    assert time.monotonic() - started < 2
    with pytest.raises(PeerLost, match=r"no-such-host\.invalid:9.*cannot connect"):
        client.probe("no-such-host.invalid:9", 2, SETTINGS)


@pytest.mark.skipif(not is_local("::1"), reason="this machine has no IPv6")
def test_ipv6() -> None:
    with serving(Handlers(generation="six"), host="::1") as address:
        assert address.startswith("[::1]:")
        assert client.probe(address, 5, SETTINGS).generation == "six"


# The directory


class Node:
    """A directory with its control server, as an engine wires them."""

    def __init__(self, name: str, store: MetadataStore | None, generation: str, **settings: Any) -> None:
        known = replace(SETTINGS, **settings)
        listener = open_rpc_listener(name, "127.0.0.1", known, peer_to_peer=store is None)
        port = listener.getsockname()[1]
        self.directory = Directory(name, store, known, generation=generation, rpc_host="127.0.0.1", rpc_port=port)
        handlers = Handlers(generation=generation, metadata=self.directory.metadata_reply)
        self.server = ControlServer(listener, handlers, known)
        self.generation = generation

    def describe(self, buffers: int = 2) -> SegmentDescriptor:
        return SegmentDescriptor(
            name=self.directory.name,
            buffers=tuple(BufferDescriptor(4096 * (i + 1), 4096, "cpu:0") for i in range(buffers)),
            tcp_data_host="127.0.0.1",
            tcp_data_port=4242,
            tcp_proto_version=2,
            generation=self.generation,
        )

    def __enter__(self) -> "Node":
        return self

    def __exit__(self, *exc: object) -> None:
        self.directory.withdraw()
        self.server.stop()


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Iterator[MemoryStore]:
    with MemoryStore(request.node.name) as opened:
        yield opened


class Recorder(MemoryStore):
    """Notes the order of puts, and refuses values of more than `limit` bytes."""

    limit, absent, overtaken = 1 << 20, False, frozenset[str]()

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.puts: list[str] = []

    def publish(self, key: str, value: str) -> None:
        if self.absent:
            raise MetadataUnavailable("gone")
        if len(value) > self.limit:
            raise MetadataError(f"{len(value)} bytes, limit {self.limit}")
        self.puts.append(key)
        super().publish(key, value)

    @property
    def lost(self) -> frozenset[str]:
        return self.overtaken


def test_publish_look_up_withdraw(store: MemoryStore) -> None:
    with Node("job:1", store, "g1") as node:
        node.directory.publish(node.describe())
        assert set(store.list("")) == {"mooncake/ram/job:1", "mooncake/rpc_meta/job:1"}
        meta = json.loads(store.get("mooncake/rpc_meta/job:1") or "")
        assert meta["ip_or_host_name"] == "127.0.0.1"
        assert meta["rpc_port"] == node.server.port
        found = node.directory.lookup("/job:1")
        assert found == node.describe()
        assert node.directory.rpc_address("job:1") == f"127.0.0.1:{node.server.port}"
        assert node.directory.data_endpoint(found) == ("127.0.0.1", 4242)
        oldest = replace(found, tcp_data_host="", tcp_data_port=0)
        assert node.directory.data_endpoint(oldest) == ("127.0.0.1", node.server.port + 1)
        node.directory.withdraw()
        assert store.list("") == {}
        with pytest.raises(SegmentNotFound, match=r"'mooncake/ram/job:1' is absent from memory://"):
            node.directory.lookup("job:1")
        with pytest.raises(SegmentNotFound, match="rpc_meta/job:1"):
            node.directory.rpc_address("job:1")


def test_keys_with_cluster_and_with_slash(store: MemoryStore) -> None:
    with Node("a", store, "g", metadata_cluster_id="blue") as node, Node("nvmeof/b", store, "h") as other:
        node.directory.publish(node.describe())
        other.directory.publish(other.describe())
        assert set(store.list("")) == {
            "mooncake/blue/ram/a",
            "mooncake/blue/rpc_meta/a",
            "mooncake/nvmeof/b",
            "mooncake/rpc_meta/nvmeof/b",
        }
        with pytest.raises(SegmentNotFound):
            other.directory.lookup("a")


def test_address_goes_first_and_an_update_is_one_put() -> None:
    with Recorder("order") as store, Node("a", store, "g") as node:
        node.directory.publish(node.describe(0))
        node.directory.publish(node.describe(3))
        assert store.puts == ["mooncake/rpc_meta/a", "mooncake/ram/a", "mooncake/ram/a"]
        assert len(node.directory.lookup("a").buffers) == 3


def test_name_of_a_living_process_is_taken(store: MemoryStore) -> None:
    with Node("a", store, "g1") as first, Node("a", store, "g2") as second:
        first.directory.publish(first.describe())
        with pytest.raises(NameInUse, match=f"'a'.*127.0.0.1:{first.server.port}"):
            second.directory.publish(second.describe())
        assert second.directory.lookup("a").generation == "g1"
        second.directory.withdraw()
        assert first.directory.lookup("a").generation == "g1"


def test_dead_owner_is_replaced_at_once(store: MemoryStore) -> None:
    with MemoryStore("test_dead_owner_is_replaced_at_once") as later, Node("a", later, "g2") as second:
        with Node("a", store, "g1") as first:
            first.directory.publish(first.describe())
            first.server.stop()
            started = time.monotonic()
            second.directory.publish(second.describe())
            assert time.monotonic() - started < 3
        assert second.directory.lookup("a").generation == "g2"  # the first one's withdraw took only its own


def test_port_of_a_dead_owner_given_to_another_process(store: MemoryStore) -> None:
    with Node("b", store, "other") as other, Node("a", store, "g2") as node:
        store.publish("mooncake/rpc_meta/a", RpcRecord("127.0.0.1", other.server.port, "dead").to_json())
        node.directory.publish(node.describe())
    with Node("a", store, "new") as node:  # the same, by ourselves
        store.publish("mooncake/rpc_meta/a", RpcRecord("127.0.0.1", node.server.port, "dead").to_json())
        node.directory.publish(node.describe())


def test_the_originals_entry_is_taken_while_it_answers(store: MemoryStore) -> None:
    with serving(Handlers(generation="")) as address, Node("a", store, "g") as node:
        record = {"ip_or_host_name": "127.0.0.1", "rpc_port": int(address.rpartition(":")[2])}
        store.publish("mooncake/rpc_meta/a", json.dumps(record))
        with pytest.raises(NameInUse):
            node.directory.publish(node.describe())
    with Node("a", store, "g") as node:
        node.directory.publish(node.describe())


@pytest.mark.slow
def test_silent_holder_is_not_replaced(store: MemoryStore) -> None:
    with bind_listener("127.0.0.1", [0]) as silent, Node("a", store, "g") as node:
        store.publish("mooncake/rpc_meta/a", RpcRecord("127.0.0.1", silent.getsockname()[1], "x").to_json())
        with pytest.raises(NameInUse, match="is there and does not answer"):
            node.directory.publish(node.describe())


@pytest.mark.parametrize("value", ["", "{", "[]", '{"rpc_port":1}', '{"ip_or_host_name":"a","rpc_port":99999}'])
def test_malformed_entry_is_replaced(store: MemoryStore, value: str) -> None:
    store.publish("mooncake/rpc_meta/a", value)
    with Node("a", store, "g") as node:
        node.directory.publish(node.describe())
        assert node.directory.rpc_address("a") == f"127.0.0.1:{node.server.port}"


def test_malformed_segment_names_key_and_store(store: MemoryStore) -> None:
    store.publish("mooncake/ram/bad", "{")
    with Node("a", store, "g") as node, pytest.raises(MetadataError, match=r"mooncake/ram/bad.*memory://"):
        node.directory.lookup("bad")


def test_failures_of_the_store_leave_nothing_behind() -> None:
    with Recorder("small") as store, Node("a", store, "g") as node:
        store.limit = 1000
        with pytest.raises(MetadataError, match=r"100 buffers.*limit 1000"):
            node.directory.publish(node.describe(100))
        assert store.list("") == {}
        node.directory.publish(node.describe(1))
        with pytest.raises(MetadataError, match="100 buffers"):
            node.directory.publish(node.describe(100))
        assert len(node.directory.lookup("a").buffers) == 1
        store.absent = True
        with pytest.raises(MetadataUnavailable, match="gone"):
            node.directory.publish(node.describe(2))


def test_a_lost_name_is_not_taken_back() -> None:
    with Recorder("lost") as store, Node("a", store, "g") as node:
        node.directory.publish(node.describe())
        store.overtaken = frozenset({"mooncake/ram/a"})
        with pytest.raises(NameInUse, match=r"mooncake/ram/a.*another name"):
            node.directory.publish(node.describe(3))


def test_a_successor_is_left_alone(store: MemoryStore) -> None:
    """As the original's programs are, who publish over whatever is there: we give the name up."""
    successor = MemoryStore("test_a_successor_is_left_alone")
    with successor, Node("a", store, "g") as node:
        node.directory.publish(node.describe())
        successor.publish("mooncake/rpc_meta/a", "theirs")
        successor.publish("mooncake/ram/a", "theirs")
        with pytest.raises(NameInUse, match=r"mooncake/ram/a.*another name"):
            node.directory.publish(node.describe(3))
        node.directory.withdraw()
        assert successor.list("") == {"mooncake/rpc_meta/a": "theirs", "mooncake/ram/a": "theirs"}


@pytest.mark.parametrize("name", ["", "/", "a\0b", "a\udcff", "x" * 600])
def test_what_can_be_no_segment_name(store: MemoryStore, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        Directory(name, store, SETTINGS, generation="g", rpc_host="127.0.0.1", rpc_port=1)
    with Node("a", store, "g") as node, Node("b", None, "h") as other:
        for directory in (node.directory, other.directory):
            for ask in (directory.lookup, directory.rpc_address):
                with pytest.raises(ConfigError, match="name"):
                    ask(name)


def test_a_data_port_behind_the_last_rpc_port(store: MemoryStore) -> None:
    store.publish("mooncake/rpc_meta/old", '{"ip_or_host_name":"127.0.0.1","rpc_port":65535}')
    store.publish("mooncake/ram/old", '{"name":"old","buffers":null}')
    with Node("a", store, "g") as node, pytest.raises(MetadataError, match="'old' tells no TCP data port"):
        node.directory.data_endpoint(node.directory.lookup("old"))


def test_peer_to_peer() -> None:
    with Node("127.0.0.1:12345", None, "g1") as node, Node("x", None, "g2") as asker:
        assert node.directory.name == f"127.0.0.1:{node.server.port}"
        with pytest.raises(MetadataError, match="metadata server"):
            asker.directory.lookup(node.directory.name)  # nothing published yet
        node.directory.publish(node.describe(3))
        found = asker.directory.lookup(node.directory.name)
        assert found == node.describe(3)
        assert asker.directory.rpc_address(found.name) == found.name
        name = node.directory.name
    with Node("y", None, "g3") as asker, pytest.raises(SegmentNotFound, match=name):
        asker.directory.lookup(name)


def test_peer_to_peer_descriptor_above_the_frame_limit() -> None:
    text = r"100 buffers.*MC_HANDSHAKE_MAX_LENGTH=2000"
    with Node("x", None, "g", handshake_max_length=2000) as node, pytest.raises(MetadataError, match=text):
        node.directory.publish(node.describe(100))


def test_beside_a_metadata_server_metadata_is_null(store: MemoryStore) -> None:
    with Node("a", store, "g") as node:
        node.directory.publish(node.describe())
        address = node.directory.rpc_address("a")
        assert client.exchange(address, Kind.METADATA, {}, 5, SETTINGS) == "null\n"
        with pytest.raises(MetadataError, match="P2PHANDSHAKE"):
            client.fetch_metadata(address, 5, SETTINGS)


OWNER = """
import sys, time
from mooncake_hpc.control.server import ControlServer, Handlers, open_rpc_listener
from mooncake_hpc.core.settings import Settings
known = Settings()
running = ControlServer(open_rpc_listener("a", "127.0.0.1", known), Handlers(generation="g1"), known)
print(running.port, flush=True)
time.sleep(60)
"""


def test_owner_killed_with_sigkill_is_replaced(store: MemoryStore) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        port = int(owner.stdout.readline())
        store.publish("mooncake/rpc_meta/a", RpcRecord("127.0.0.1", port, "g1").to_json())
        with Node("a", store, "g2") as node:
            with pytest.raises(NameInUse, match=str(port)):
                node.directory.publish(node.describe())
            owner.send_signal(signal.SIGKILL)
            owner.wait(5)
            node.directory.publish(node.describe())
    finally:
        owner.kill()
        owner.wait(5)
        assert owner.stdout is not None
        owner.stdout.close()
