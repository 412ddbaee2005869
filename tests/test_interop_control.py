"""The control plane against the original: its Python API and our control server, in P2PHANDSHAKE mode."""

import ctypes
import json
import time
from collections.abc import Iterator

import pytest
from interop import VERSIONS, Peer

from mooncake_hpc.control import client
from mooncake_hpc.control.directory import Directory
from mooncake_hpc.control.server import ControlServer, Handlers, Notifications, open_rpc_listener
from mooncake_hpc.core.address import bind_listener, join
from mooncake_hpc.core.errors import NameInUse
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.memory import MemoryStore
from mooncake_hpc.wire.descriptor import BufferDescriptor, SegmentDescriptor
from mooncake_hpc.wire.rpc_frames import Kind

pytestmark = pytest.mark.interop

SETTINGS = Settings()
LENGTH = 1 << 16


@pytest.fixture(scope="module", params=VERSIONS)
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    original = Peer(request.param, LENGTH)
    yield original
    original.close()


class Ours:
    """Our control plane in P2PHANDSHAKE mode, with one published buffer. Nobody serves its data port."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(LENGTH)
        listener = open_rpc_listener("x", "127.0.0.1", SETTINGS, peer_to_peer=True)
        port = listener.getsockname()[1]
        self.directory = Directory("x", None, SETTINGS, generation="g", rpc_host="127.0.0.1", rpc_port=port)
        self.box = Notifications()
        handlers = Handlers("g", self.directory.metadata_reply, self.box.put)
        self.server = ControlServer(listener, handlers, SETTINGS)
        self.name = self.directory.name
        self.data = bind_listener("127.0.0.1", [0])
        data_port = self.data.getsockname()[1]
        buffer = BufferDescriptor(ctypes.addressof(self.memory), LENGTH, "cpu:0")
        self.directory.publish(SegmentDescriptor(self.name, (buffer,), "127.0.0.1", data_port, 2, "g"))


@pytest.fixture
def ours() -> Iterator[Ours]:
    node = Ours()
    yield node
    node.server.stop()
    node.data.close()


def test_we_probe_the_original(peer: Peer) -> None:
    assert client.probe(peer.name, 10, SETTINGS) == client.ProbeReply("", False)
    assert not client.probe(peer.name, 10, SETTINGS, "any connection", 1).fenced


def test_the_original_probes_us(peer: Peer, ours: Ours) -> None:
    answer = peer.call("send_probe", ours.name)
    if answer == "absent":
        return  # 0.3.10 answers probes, but its Python cannot send one
    assert answer == 0
    ours.server.stop()
    assert peer.call("send_probe", ours.name) != 0


def test_we_read_the_originals_metadata(peer: Peer, ours: Ours) -> None:
    descriptor = ours.directory.lookup(peer.name)
    assert descriptor.name == peer.name
    assert [(b.address, b.length) for b in descriptor.buffers] == [(peer.buffer, LENGTH)]
    assert descriptor.generation == ""
    host, port = ours.directory.data_endpoint(descriptor)
    assert host == "127.0.0.1"
    assert 0 < port < 65536


def test_the_original_reads_our_metadata(peer: Peer, ours: Ours) -> None:
    assert peer.call("get_first_buffer_address", ours.name) == ctypes.addressof(ours.memory)


def test_we_notify_the_original(peer: Peer) -> None:
    client.notify(peer.name, "ours:1", "hällo", 10, SETTINGS)
    client.notify(peer.name, "ours:1", "again", 10, SETTINGS)
    assert peer.call("get_notifies") == [["ours:1", "hällo"], ["ours:1", "again"]]
    assert peer.call("get_notifies") == []


def test_the_original_notifies_us(peer: Peer, ours: Ours) -> None:
    """It notifies after a transfer; one of zero bytes takes no answer (0.3.10 does send its header)."""
    assert peer.call("notify", ours.name, ctypes.addressof(ours.memory), "peer", "done") == 0
    deadline = time.monotonic() + 5
    taken = ours.box.take()
    while not taken and time.monotonic() < deadline:
        time.sleep(0.05)
        taken = ours.box.take()
    assert taken == [("peer", "done")]


def test_rdma_handshake_with_a_tcp_node_of_the_original(peer: Peer) -> None:
    reply = json.loads(client.exchange(peer.name, Kind.CONNECTION, {"local_nic_path": "a@b"}, 10, SETTINGS))
    assert reply["qp_num"] == []


def test_name_of_a_living_original_is_taken_until_it_is_killed() -> None:
    original = Peer()
    with MemoryStore("interop") as store:
        record = {"ip_or_host_name": "127.0.0.1", "rpc_port": original.port}
        store.publish("mooncake/rpc_meta/a", json.dumps(record))
        listener = open_rpc_listener("a", "127.0.0.1", SETTINGS)
        with listener:
            directory = Directory(
                "a",
                store,
                SETTINGS,
                generation="g",
                rpc_host="127.0.0.1",
                rpc_port=listener.getsockname()[1],
            )
            try:
                with pytest.raises(NameInUse, match=join("127.0.0.1", original.port)):
                    directory.publish(SegmentDescriptor("a", generation="g"))
            finally:
                original.close()
            directory.publish(SegmentDescriptor("a", generation="g"))
