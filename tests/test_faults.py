"""Peers that die, stop or talk nonsense, an etcd that goes away: clear errors within deadlines, nothing left over."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_metadata import Etcd

from mooncake_hpc import READ, WRITE, TransferEngine
from mooncake_hpc.core.errors import (
    ConfigError,
    MetadataError,
    MetadataUnavailable,
    PeerLost,
    SegmentNotFound,
    TransferTimeout,
)
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.testing.link import Link, linked, requests
from mooncake_hpc.testing.peer import PeerProcess, digest
from mooncake_hpc.transports.shm.client import dial
from mooncake_hpc.transports.tcp import client as tcp

HOST = "127.0.0.1"
P2P = "P2PHANDSHAKE"
SIZE = 24 << 20  # bytes: more than the socket buffers of both sides hold
IMPATIENT = Settings(tcp_progress_timeout=1.0)

pytestmark = pytest.mark.usefixtures("no_leaks")


def engine(
    metadata: str, name: str = "ours:1", protocol: str = "tcp", settings: Settings | None = None
) -> TransferEngine:
    return TransferEngine(name, metadata, protocol=protocol, bind_address=HOST, settings=settings)


# --- peers that stop or die -------------------------------------------------------------------------------------


@pytest.fixture
def brief_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that cannot say what it has taken is waited for 1 s longer than this."""
    monkeypatch.setattr(tcp, "FENCE_TIMEOUT", 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("opcode", [READ, WRITE])
def test_a_wait_on_a_stopped_peer_ends_at_its_deadline(opcode: int, brief_fences: None) -> None:
    """The batch goes on; cancelled, it ends although the peer cannot say what it has taken."""
    with linked("tcp", SIZE) as link:
        link.run(link.request(opcode, 0, 0, SIZE))
        link.peer.suspend()
        batch = link.engine.submit(requests(link.request(opcode, 0, 0, SIZE)))
        began = time.monotonic()
        with pytest.raises(TransferTimeout, match=r"not done after 0\.5 s"):
            batch.wait(0.5)
        assert 0.5 <= time.monotonic() - began < 5
        batch.cancel(15)
        assert batch.done
        link.peer.resume()
        link.run(link.request(opcode, 0, 0, SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [1, 3])
def test_writes_that_a_stopped_peer_has_not_read_never_land_on_newer_ones(lanes: int, brief_fences: None) -> None:
    """Some are in its socket when their batch fails. A second try comes after them, or fails."""
    settings = Settings(tcp_progress_timeout=1.0, tcp_lanes_per_peer=lanes)
    with linked("tcp", SIZE, settings=settings) as link:
        pieces = [(at, 1 << 20) for at in range(0, SIZE, 1 << 20)]
        for number in range(1, 4):
            link.local[:] = number
            link.peer.suspend()
            batch = link.engine.submit(requests(*[link.request(WRITE, at, at, size) for at, size in pieces]))
            with pytest.raises((TransferTimeout, PeerLost), match="no progress"):
                batch.wait(30)
            link.local[:] = 100 + number
            again = link.engine.submit(requests(*[link.request(WRITE, at, at, size) for at, size in reversed(pieces)]))
            link.peer.resume()
            with contextlib.suppress(PeerLost, TransferTimeout):
                again.wait(30)
            link.run(link.request(WRITE, 0, 0, SIZE))
            assert link.peer.call("uniform", link.remote) == 100 + number
            time.sleep(0.1)
            assert link.peer.call("uniform", link.remote) == 100 + number


@pytest.mark.slow
def test_a_stopped_peer_does_not_hold_up_others_or_our_end() -> None:
    with linked("tcp", 1 << 20) as link, PeerProcess(P2P, "tcp", "other:1") as other:
        remote = other.call("allocate", 1 << 20)
        healthy = link.engine.open_segment(other.name)
        link.run(link.request(WRITE, 0, 0, 1 << 20))
        link.peer.suspend()
        stuck = link.engine.submit(requests(*[link.request(WRITE, 0, 0, 1 << 20)] * 50))
        for _ in range(20):
            link.engine.write(link.local, healthy, remote, timeout=10)
        began = time.monotonic()
        link.engine.close()
        assert time.monotonic() - began < 12
        assert stuck.join(0)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["tcp", "shm", "auto"])
def test_a_killed_peer_is_replaced_under_its_name_at_once(etcd: str, protocol: str) -> None:
    """At random moments of a transfer."""
    with engine(etcd, "faults-ours:1", protocol) as ours:
        local, chooser, name = ours.allocate(4 << 20), random.Random(7), f"faults-{protocol}:1"
        for number in range(1, 4):
            with PeerProcess(etcd, protocol, name) as peer:
                remote = peer.call("allocate", local.size)
                segment = ours.open_segment(name)
                link = Link(ours, peer, segment, local, remote)
                local[:] = number
                link.run(link.request(WRITE, 0, 0, local.size))
                assert peer.call("uniform", remote) == number
                batch = ours.submit(requests(*[link.request(WRITE, 0, 0, local.size)] * 4000))
                time.sleep(chooser.uniform(0, 0.05))
                peer.process.kill()
                with pytest.raises(PeerLost, match=name):
                    batch.wait(20)
                began = time.monotonic()
                with pytest.raises(PeerLost, match=name):
                    link.run(link.request(READ, 0, 0, 1))
                assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_segment_whose_owner_was_killed(etcd: str) -> None:
    """Its keys live as long as the lease: it can be found, but not reached."""
    with engine(etcd, "faults-ours:2") as ours:
        local = ours.allocate(4096)
        with PeerProcess(etcd, "tcp", "faults-dead:1") as peer:
            remote = peer.call("allocate", 4096)
            peer.process.kill()
            peer.process.wait()
            began = time.monotonic()
            with pytest.raises(PeerLost, match=r"faults-dead:1.*refused"):
                ours.read(local, ours.open_segment("faults-dead:1"), remote)
            assert time.monotonic() - began < 10 and not ours.probe("faults-dead:1")
    with engine(etcd, "faults-ours:2") as ours, pytest.raises(SegmentNotFound, match="nobody:1"):
        ours.open_segment("nobody:1")


# --- clients of the data port -----------------------------------------------------------------------------------


@contextlib.contextmanager
def dialled(link: Link, count: int) -> Iterator[list[socket.socket]]:
    """Bare connections to the peer's data port."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(link.segment.endpoint(), 10)) for _ in range(count)]


def header(size: int, address: int, opcode: int) -> bytes:
    return struct.pack("<QQB7x", size, address, opcode)


def still_works(link: Link, number: int) -> None:
    link.local[:] = number
    link.run(link.request(WRITE, 0, 0, link.local.size), timeout=20)
    assert link.peer.call("uniform", link.remote) == number


@pytest.fixture(scope="module")
def node() -> Iterator[Link]:
    with linked("tcp", 1 << 20) as link:
        still_works(link, 10)  # connected, so that what stays open is no leak of a test's
        yield link


@pytest.mark.parametrize(
    "size", [0, (1 << 20) + 1, 1 << 62, 1 << 63, (1 << 64) - 1], ids=["none", "one more", "2^62", "2^63", "2^64-1"]
)
@pytest.mark.parametrize("opcode", [0, 1, 0x80, 0x81, 0x85])
def test_impossible_requests_are_refused_and_the_connection_closed(node: Link, size: int, opcode: int) -> None:
    with dialled(node, 1) as [client]:
        client.sendall(header(size, node.remote, opcode))
        refusal = struct.pack("<II", 1, 0x4D435456) if opcode & 0x80 else b""
        assert client.recv(64) == refusal
        if refusal:
            assert client.recv(64) == b""
    still_works(node, 11)


def test_a_burst_of_connections_is_not_dropped(node: Link) -> None:
    """The original opens one a request, 300 at once; those for which there is no room wait a second to try again."""
    node.peer.suspend()  # nobody accepts meanwhile
    try:
        with dialled(node, 600):
            pass
    finally:
        node.peer.resume()
    still_works(node, 12)


def test_garbage_on_the_data_port(node: Link) -> None:
    """Whatever comes, no byte of our memory changes, and others are served."""
    still_works(node, 12)
    chooser = random.Random(8)
    for _ in range(100):
        with dialled(node, 1) as [client], contextlib.suppress(ConnectionError):
            client.sendall(chooser.randbytes(chooser.randrange(1, 200_000)))
            client.shutdown(socket.SHUT_WR)
            while client.recv(1 << 16):
                pass
    assert node.peer.call("uniform", node.remote) == 12
    still_works(node, 13)


def test_slow_clients_do_not_hold_up_others(node: Link) -> None:
    """Half a header, half a body, and a reader that does not read."""
    with dialled(node, 30) as clients:
        for index, client in enumerate(clients):
            if index % 3 == 0:
                client.sendall(header(100, node.remote, 0x81)[:13])
            elif index % 3 == 1:
                client.sendall(header(1000, node.remote, 0x81) + bytes([34]) * 500)  # may land late
            else:
                client.sendall(header(1 << 20, node.remote, 0x80) * 200)
        for number in range(500):
            node.local[:1000] = number % 256
            node.run(node.request(WRITE, 0, 0, 1000), node.request(READ, 0, 0, 1000), timeout=20)
    still_works(node, 34)


@pytest.mark.slow
def test_more_silent_clients_than_connections_allowed(node: Link) -> None:
    """The ones that never said anything make room."""
    with dialled(node, 1100):
        with engine(P2P, "late:1") as late:
            local = late.allocate(4096)
            local[:] = 35
            late.write(local, late.open_segment(node.peer.name), node.remote, timeout=20)
        assert node.remote_digest(0, 4096) == digest(np.full(4096, 35, np.uint8))
        still_works(node, 36)


@pytest.mark.slow
def test_clients_of_the_hand_over_socket_that_stop_half_way_hold_up_nobody() -> None:
    """Of shared memory: silent, half a length, half a request, garbage, too much, and one that reads no answer."""
    with linked("shm", 1 << 20) as link, contextlib.ExitStack() as stack:
        asked = struct.pack("<I", 11) + b'{"have":[]}'
        for words in (b"", b"\x05\x00", struct.pack("<I", 100) + b"{", b"\xff" * 500, asked * 20_000):
            client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.connect("\0" + link.segment.descriptor.shm_socket)
            client.settimeout(0.2)
            with contextlib.suppress(OSError):
                client.sendall(words)
        for _ in range(300):  # more than may be connected: the silent ones make room
            silent = dial(link.segment.descriptor.shm_socket)
            assert silent is not None
            stack.enter_context(silent)
        began = time.monotonic()
        link.peer.call("allocate", 4096)  # what was mapped is out of date
        with engine(P2P, "second:1", "shm") as second:
            local = second.allocate(1 << 20)
            second.read(local, second.open_segment(link.peer.name), link.remote, timeout=10)
        still_works(link, 40)
        assert time.monotonic() - began < 10


# --- etcd -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_transfers_go_on_while_etcd_is_away(tmp_path: Path) -> None:
    """Only what needs it fails, within its deadline; when it is back, so is everything."""
    settings = Settings(metadata_timeout=1.0, lease_ttl=2.0)
    etcd = Etcd(tmp_path)
    etcd.start()
    try:
        with PeerProcess(etcd.endpoint, "tcp") as peer, engine(etcd.endpoint, settings=settings) as ours:
            local, remote = ours.allocate(1 << 20), peer.call("allocate", 1 << 20)
            link = Link(ours, peer, ours.open_segment(peer.name), local, remote)
            still_works(link, 1)
            etcd.kill()
            still_works(link, 2)
            began = time.monotonic()
            with pytest.raises(MetadataUnavailable, match=str(etcd.endpoint)):
                ours.register(bytearray(100))
            with pytest.raises(MetadataUnavailable):
                ours.open_segment("another:1")
            assert time.monotonic() - began < 10
            link.peer.call("cut_connections")
            still_works(link, 3)  # over a new connection: the peer itself says that it still is the same
            etcd.start()
            deadline = time.monotonic() + 20
            while True:
                try:
                    ours.register(bytearray(100))
                    break
                except MetadataUnavailable:
                    assert time.monotonic() < deadline
            still_works(link, 4)
    finally:
        etcd.kill()


@pytest.mark.slow
def test_more_buffers_than_a_metadata_value_holds(etcd: str) -> None:
    memory = np.zeros(40_000, np.uint8)
    with engine(etcd, "faults-many:1") as ours:
        ours.register_many([memory[i : i + 1] for i in range(0, 20_000, 2)])
        with pytest.raises(MetadataError, match=r"cannot publish 40000 buffers.*fewer, larger"):
            ours.register_many([memory[i : i + 1] for i in range(30_000)])
        assert len(ours.open_segment("faults-many:1").buffers) == 10_000
        ours.register(memory)
        assert len(ours._registrations) == 10_001


def test_a_busy_port() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        settings = Settings(legacy_rpc_port=True)
        with pytest.raises(ConfigError, match=f"{port}.*in use"):
            engine("memory://busy", f"{HOST}:{port}", settings=settings)


@pytest.mark.slow
def test_nothing_is_left_of_an_engine_that_could_not_start(etcd: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for metadata in ("127.0.0.1:1", "etcd://127.0.0.1:1,127.0.0.1:2"):
        with pytest.raises(MetadataUnavailable):
            engine(metadata, settings=Settings(metadata_timeout=0.5))
    with pytest.raises(ConfigError):
        TransferEngine("x:1", etcd, protocol="carrier-pigeon")
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_the_memory_of_a_peer_that_died_is_given_back(etcd: str) -> None:
    """Whoever maps it keeps it in use. Peers that come and go under one name leave nothing in those that stay."""

    def held() -> int:
        links = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
        return sum("memfd:mooncake" in os.readlink(link) for link in links if os.path.islink(link))

    with engine(etcd, "faults-ours:4", "shm") as ours:
        local, name = ours.allocate(4096), "faults-mortal:1"
        counts = []
        for _ in range(3):
            with PeerProcess(etcd, "shm", name) as peer:
                remote = peer.call("allocate", local.size, 5)
                segment = ours.open_segment(name)
                ours.read(local, segment, remote)
                array = segment.mapped(remote, 100)
                peer.process.kill()
                peer.process.wait()
            counts.append(held())
        assert counts[0] == counts[1] == counts[2], counts
        assert array is not None and digest(array) == digest(local[:100])
