"""RDMA with what goes wrong: devices, rights, limits, peers and handshakes. A clear error, in time, nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import clean_env
from rdma_resources import nothing_is_left as nothing_is_left

from mooncake_hpc import READ, WRITE, TransferEngine
from mooncake_hpc.control.client import exchange
from mooncake_hpc.core.errors import ConfigError, DeviceError, MooncakeError, TransferError
from mooncake_hpc.core.settings import RdmaSettings, Settings
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.testing.fork_server import Nursery
from mooncake_hpc.testing.link import linked
from mooncake_hpc.testing.peer import PeerError, PeerProcess, digest, pattern
from mooncake_hpc.transports.rdma import gid
from mooncake_hpc.wire.rpc_frames import Kind

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("forked_peers")]

HOST = "127.0.0.1"
P2P = "P2PHANDSHAKE"
SIZE = 4 << 20


def engine(
    metadata: str = P2P, name: str = "ours:1", settings: Settings | None = None, **options: str
) -> TransferEngine:
    return TransferEngine(name, metadata, protocol="rdma", bind_address=HOST, settings=settings, **options)  # type: ignore[arg-type]


# --- devices and rights ---------------------------------------------------------------------------------------


def test_no_such_device(nics: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"nic_7.*{nics[0]}"):
        engine(device_name="nic_7")


def test_a_port_that_is_down(rxe: list[str]) -> None:
    last = rxe[-1]
    subprocess.run(["ip", "link", "set", f"rocep{last[3:]}", "down"], check=True)
    try:
        deadline = time.monotonic() + 10
        with pytest.raises(DeviceError, match=f"{last} port 1: the port is down"):
            while time.monotonic() < deadline:
                engine(device_name=last).close()
    finally:
        subprocess.run(["ip", "link", "set", f"rocep{last[3:]}", "up"], check=True)


def test_no_such_gid(nics: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{nics[0]}.*no GID of index 77"):
        engine(device_name=nics[0], settings=Settings(rdma=RdmaSettings(gid_index=77)))


TWO_NODES = """
import ctypes, os, resource, sys
from mooncake_hpc import TransferEngine
from mooncake_hpc.core.errors import MooncakeError

def carry(value):
    with (TransferEngine("a:1", "memory://x", protocol="rdma", bind_address="127.0.0.1") as a,
          TransferEngine("b:1", "memory://x", protocol="rdma", bind_address="127.0.0.1") as b):
        theirs, ours = a.allocate(int(sys.argv[1])), b.allocate(4096)
        ours[:] = value
        b.write(ours, b.open_segment("a:1"), theirs.ctypes.data)
        return int(theirs[4095])

limit, user = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
if user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: as a process that never was another's
else:  # capset(2), version 3 of it: none
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
try:
    print(f"user {os.getuid()}: arrived {carry(7)}")
except MooncakeError as error:
    print(type(error).__name__, error)
"""
USER = 65534  # and the group of that number


def two_nodes(nursery: Nursery, nbytes: int, memlock: int, user: int = 0) -> str:
    """What a process says that moves 4 KiB within `nbytes` of memory and may lock `memlock` bytes of it: as `user`, or
    owning its files but without privileges."""
    arguments = str(nbytes), str(memlock), str(user)
    return nursery.run(TWO_NODES, *arguments, env=clean_env(MC_TE_FILTERS="rxe0"), timeout=200)


@contextlib.contextmanager
def devices_for(group: int, mode: int) -> Iterator[None]:
    """The devices' files are root's and the group's, with this mode."""
    files = [f"/dev/infiniband/{name}" for name in os.listdir("/dev/infiniband") if name.startswith("uverbs")]
    before = {file: os.stat(file) for file in files}
    for file in files:
        os.chown(file, 0, group)
        os.chmod(file, mode)
    try:
        yield
    finally:
        for file, was in before.items():
            os.chown(file, was.st_uid, was.st_gid)
            os.chmod(file, was.st_mode & 0o777)


def test_a_user_with_rights_on_the_devices(rxe: list[str], forked_peers: Nursery) -> None:
    with devices_for(USER, 0o660):
        said = two_nodes(forked_peers, 1 << 20, 8 << 20, USER)
    assert f"user {USER}: arrived 7" in said, said


def test_too_little_lockable_memory(rxe: list[str], forked_peers: Nursery) -> None:
    """The error names the limit, both sizes, and comes before the kernel's bare ENOMEM."""
    said = two_nodes(forked_peers, 64 << 20, 1 << 20)
    assert re.search(rf"RegistrationError {64 << 20} bytes .*RLIMIT_MEMLOCK .* {1 << 20} bytes", said), said


def test_a_device_without_permission(rxe: list[str], forked_peers: Nursery) -> None:
    with devices_for(0, 0):
        said = two_nodes(forked_peers, 1 << 20, resource.RLIM_INFINITY)
    assert "ConfigError" in said and "no right to read and write /dev/infiniband/uverbs" in said, said


def test_subprocesses_while_memory_is_registered() -> None:
    """Children may come and go; the parent's pages stay the NIC's."""
    with linked("rdma", SIZE) as link:
        for number in range(3):
            link.local[:] = pattern(number, SIZE)
            assert subprocess.run(["true"], timeout=20).returncode == 0
            child = os.fork()
            if child == 0:
                os._exit(0)
            link.local[: SIZE // 2] = pattern(number + 50, SIZE // 2)
            link.run(link.request(WRITE, 0, 0, SIZE))
            os.waitpid(child, 0)
            assert link.remote_digest() == digest(link.local)


def test_engines_at_rest_take_no_processor() -> None:
    """Their threads sleep on the device's channels."""
    with linked("rdma", SIZE) as link:
        link.run(link.request(WRITE, 0, 0, SIZE))
        used = time.process_time()
        time.sleep(2)
        assert time.process_time() - used < 0.4


# --- peers ----------------------------------------------------------------------------------------------------


def test_a_peer_without_rdma() -> None:
    """Each side says what the other speaks."""
    with PeerProcess(P2P, "tcp") as peer, engine() as ours, pytest.raises(MooncakeError, match=f"{peer.name}.*tcp"):
        remote = peer.call("allocate", 4096)
        ours.read(ours.allocate(4096), ours.open_segment(peer.name), remote)
    with (
        PeerProcess(P2P, "rdma") as peer,
        TransferEngine("ours:1", P2P, protocol="tcp", bind_address=HOST) as ours,
        pytest.raises(MooncakeError, match=f"{peer.name}.*rdma"),
    ):
        remote = peer.call("allocate", 4096)
        ours.read(ours.allocate(4096), ours.open_segment(peer.name), remote)


@pytest.mark.parametrize(("here", "there"), [(1, 3), (4, 2)])
def test_other_numbers_of_queue_pairs(here: int, there: int) -> None:
    """Our nodes agree on the smaller one."""
    settings = Settings(rdma=RdmaSettings(queue_pairs=here))
    env = {**os.environ, "MC_NUM_QP_PER_EP": str(there)}
    with linked("rdma", SIZE, settings=settings, peer_env=env) as link:
        link.local[:] = pattern(1, SIZE)
        link.run(link.request(WRITE, 0, 0, SIZE))
        assert link.remote_digest() == digest(link.local)
        link.hammer(link.local, write=False)  # the peer opens its way to us
        assert link.peer.call("stop_hammer")[1] == ""


def test_a_region_that_the_peer_has_withdrawn() -> None:
    """Its key, used without asking again, is refused by the device, and the way goes on for other memory."""
    with linked("rdma", SIZE) as link:
        gone = link.peer.call("allocate", 65536, 3)
        link.engine.read(link.local[:65536], link.segment, gone)
        link.peer.call("unregister", gone)
        with pytest.raises(TransferError, match=link.peer.name):
            link.engine.write(link.local[:65536], link.segment, gone)
        assert link.peer.call("digest", gone) == digest(pattern(3, 65536))
        link.run(link.request(READ, 0, 0, SIZE))


# --- handshakes -----------------------------------------------------------------------------------------------


def connection(address: str, **fields: object) -> dict[str, object]:
    """The reply to a Connection frame."""
    frame = {
        "local_nic_path": "stranger:1@rxe0", "peer_nic_path": "peer:1@rxe0", "qp_num": [17, 18], "local_lid": 0,
        "local_gid": "00:00:00:00:00:00:00:00:00:00:ff:ff:0a:4d:00:01", "ready_ack": False, "reply_msg": "",
        "payload": "", **fields,
    }  # fmt: skip
    reply = json.loads(exchange(address, Kind.CONNECTION, frame, 20, Settings()))
    assert isinstance(reply, dict)
    return reply


@pytest.mark.parametrize(
    "fields",
    [
        {"peer_nic_path": "peer:1@nic_7"},
        {"peer_nic_path": "somebody-else:1@rxe0"},
        {"peer_nic_path": "no path"},
        {"qp_num": []},
        {"qp_num": "many"},
        {"qp_num": [1 << 40]},
        {"local_gid": "zz"},
        {"local_nic_path": 5},
        {"ready_ack": True},
    ],
    ids=lambda fields: " ".join(f"{k}={v}" for k, v in fields.items()),
)
def test_wrong_handshakes_are_refused_with_a_reason(bystander: PeerProcess, fields: dict[str, object]) -> None:
    own = {"peer_nic_path": f"{bystander.name}@rxe0"}
    reply = connection(bystander.name, **{**own, **fields})
    assert reply["reply_msg"], reply
    assert bystander.call("notifications") == []  # it lives


def test_a_gid_that_nothing_reaches(rxe: list[str]) -> None:
    """The refusal says what was tried, and the peer still connects to others by its best GID."""
    gone = "20:01:0d:b8:00:00:00:00:00:00:00:00:00:00:00:01"
    tried = r"rxe0 port 1: queue pair \d+ to 17 at 2001:0db8:.*:0001 with GID index \d+, MTU \d+"
    with PeerProcess(P2P, "rdma") as peer, engine() as ours:
        reply = connection(peer.name, peer_nic_path=f"{peer.name}@rxe0", local_gid=gone)
        assert re.search(tried, str(reply["reply_msg"])), reply
        ours.write(ours.allocate(4096), ours.open_segment(peer.name), peer.call("allocate", 4096))


def test_a_gid_that_the_peer_cannot_reach(rxe: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel connects no link-local address (here tried first) with an IPv4 one: the next is used and published."""
    settings = Settings()
    best = gid.candidates(rxe[0], 1, settings)
    assert len(best) > 1, best
    monkeypatch.setattr(gid, "rank", lambda table, infiniband, rank=gid.rank: rank(table, infiniband)[::-1])
    env = {**os.environ, "MC_GID_INDEX": str(best[0].index)}
    with PeerProcess(P2P, "rdma", env=env) as peer, engine(device_name=rxe[0]) as ours:
        ours.write(ours.allocate(4096), ours.open_segment(peer.name), peer.call("allocate", 4096))
        assert ours.open_segment(ours.name).descriptor.devices[0].gid == best[0].text


@pytest.fixture(scope="module")
def bystander(forked_peers: None) -> Iterator[PeerProcess]:
    with PeerProcess(P2P, "rdma") as peer:
        yield peer


@contextlib.contextmanager
def impostor(etcd: str, name: str, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """A published RDMA segment whose RPC port is served by `answer`."""
    with socket.create_server((HOST, 0)) as listener, open_store(etcd) as store:
        segment = {
            "buffers": [{"addr": 1 << 30, "length": 1 << 20, "name": "cpu:0", "lkey": [1], "rkey": [1]}],
            "devices": [{"gid": "00:00:00:00:00:00:00:00:00:00:ff:ff:0a:4d:00:01", "lid": 0, "name": "rxe0"}],
            "name": name, "priority_matrix": {"cpu:0": [["rxe0"], []], "cpu:1": [["rxe0"], []]},
            "protocol": "rdma", "tcp_data_port": 0, "tcp_proto_version": 1, "timestamp": "2026-01-01 00:00:00.000000",
        }  # fmt: skip
        store.publish(f"mooncake/ram/{name}", json.dumps(segment))
        port = listener.getsockname()[1]
        store.publish(f"mooncake/rpc_meta/{name}", json.dumps({"ip_or_host_name": HOST, "rpc_port": port}))

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    answer(listener.accept()[0])

        threading.Thread(target=serve, daemon=True).start()
        yield
        store.withdraw(f"mooncake/ram/{name}")
        store.withdraw(f"mooncake/rpc_meta/{name}")


held: list[socket.socket] = []  # silent connections


def garbage(client: socket.socket) -> None:
    with client:
        client.recv(65536)
        client.sendall(b"\xff" * 64)


def empty(client: socket.socket) -> None:
    with client:
        client.recv(65536)
        body = b"\x00{}\n"
        client.sendall(len(body).to_bytes(8, "little") + body)


@pytest.mark.parametrize("answer", [held.append, garbage, empty], ids=["silence", "garbage", "emptiness"])
def test_handshakes_that_come_to_nothing(etcd: str, answer: Callable[[socket.socket], None]) -> None:
    """An error that names the peer, in time; transfers to others go on meanwhile."""
    name = "rdma-impostor:1"
    with impostor(etcd, name, answer), PeerProcess(etcd, "rdma", "rdma-honest:1") as peer, engine(etcd) as ours:
        local, remote = ours.allocate(65536), peer.call("allocate", 65536)
        honest = ours.open_segment(peer.name)
        failure: list[BaseException] = []

        def attempt() -> None:
            try:
                ours.read(local[:4096], ours.open_segment(name), 1 << 30, timeout=40)
            except BaseException as error:
                failure.append(error)

        attempt_thread = threading.Thread(target=attempt)
        began = time.monotonic()
        attempt_thread.start()
        for _ in range(3):
            ours.write(local[4096:], honest, remote, timeout=15)
        attempt_thread.join(60)
        assert not attempt_thread.is_alive() and time.monotonic() - began < 60
        assert isinstance(failure[0], TransferError) and name in str(failure[0]), failure
    while held:
        held.pop().close()


def test_a_peer_that_cannot_open_its_device_says_so() -> None:
    with pytest.raises(PeerError, match=r"ConfigError.*no GID of index 77"):
        PeerProcess(P2P, "rdma", env={**os.environ, "MC_GID_INDEX": "77"})
