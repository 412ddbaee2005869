"""Mooncake's programs where a secret is set: refused in both roles, unless their addresses are allowed."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from interop import NEWEST, OUR_BENCH, VERSIONS, Peer, bench_target, peer_bench, peer_env
from test_interop_bench import our_name, published, unused_name

from mooncake_hpc import TransferEngine
from mooncake_hpc.control import client
from mooncake_hpc.core.authentication import Authentication, Reason, Secret
from mooncake_hpc.core.errors import AuthenticationError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.tcp import proofs

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

P2P = "P2PHANDSHAKE"
LENGTH = 1 << 16


@pytest.fixture(scope="module", params=VERSIONS)
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    original = Peer(request.param, LENGTH)
    yield original
    original.close()


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text("the secret of these tests")
    return str(path)


def engine(secret_file: str, allowed: str) -> TransferEngine:
    known = Settings(secret_file=secret_file, allow_unauthenticated=allowed)
    return TransferEngine("ours:1", P2P, protocol="tcp", bind_address="127.0.0.1", settings=known)


def test_mooncake_is_refused_in_both_roles(peer: Peer, secret_file: str) -> None:
    with engine(secret_file, "10.0.0.0/8") as ours:
        memory = ours.allocate(LENGTH)
        memory[:] = 5
        began = time.monotonic()
        with pytest.raises(AuthenticationError, match=f"at {peer.name} does not authenticate itself") as failure:
            ours.open_segment(peer.name)
        assert failure.value.reason == Reason.NO_SECRET_THERE and time.monotonic() - began < 3
        address = int(memory.ctypes.data)
        assert peer.call("get_first_buffer_address", ours.name) != address  # it does not even see our metadata
        assert peer.call("transfer_sync_write", ours.name, peer.buffer, address, LENGTH) != 0
        assert (memory == 5).all()


def test_mooncake_is_served_and_read_at_an_allowed_address(peer: Peer, secret_file: str) -> None:
    with engine(secret_file, "127.0.0.1") as ours:
        memory = ours.allocate(LENGTH)
        peer.call("fill", 3)
        assert peer.call("transfer_sync_write", ours.name, peer.buffer, int(memory.ctypes.data), LENGTH) == 0
        mine = np.empty(LENGTH, np.uint8)
        ours.register(mine)
        segment = ours.open_segment(peer.name)
        ours.read(mine, segment, peer.buffer)
        assert (mine == memory).all()
        assert ours.probe(peer.name)
        ours.notify(segment, "ours", "text")
        assert peer.call("get_notifies") == [["ours", "text"]]


@pytest.mark.parametrize(("allowed", "code"), [((), 1), (("--allow_unauthenticated=127.0.0.0/8",), 0)])
def test_mooncakes_bench_at_a_target_with_a_secret(
    etcd: str, secret_file: str, allowed: tuple[str, ...], code: int
) -> None:
    name = unused_name()
    where = (f"--metadata_server={etcd}", f"--secret_file={secret_file}", *allowed)
    room = ("--block_size=65536", "--batch_size=8", "--threads=1", f"--buffer_size={16 << 20}")
    with bench_target(OUR_BENCH, *where, *room, f"--local_server_name={name}", ready=our_name):
        initiator = [*peer_bench(NEWEST), "--mode=initiator", "--protocol=tcp", f"--metadata_server={etcd}", *room]
        done = subprocess.run(
            [*initiator, f"--local_server_name={unused_name()}", f"--segment_id={name}", "--duration=1"],
            env=peer_env(), timeout=60, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    assert done.returncode == code and ("FAILED" in done.stdout) == bool(code), done.stdout[-2000:]


def test_our_bench_at_mooncakes_target(etcd: str, secret_file: str) -> None:
    name = unused_name()
    room = ("--block_size=65536", "--batch_size=8", "--threads=1", f"--buffer_size={64 << 20}")
    with bench_target(
        peer_bench(NEWEST), f"--metadata_server={etcd}", f"--local_server_name={name}", *room,
        ready=lambda _: published(etcd, name),
    ):  # fmt: skip
        for allowed, code in (("127.0.0.1", 0), ("10.0.0.1", 1)):
            words = (f"--secret_file={secret_file}", f"--allow_unauthenticated={allowed}", f"--segment_id={name}")
            done = subprocess.run(
                [*OUR_BENCH, "--mode=initiator", "--protocol=tcp", f"--metadata_server={etcd}", *room, *words,
                 f"--local_server_name={unused_name()}", "--duration=0.3"],
                env=peer_env(), timeout=60, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert done.returncode == code, done.stdout[-2000:]
            assert ("does not authenticate itself" in done.stdout) == bool(code), done.stdout[-2000:]


def test_what_begins_an_exchange_does_no_harm_to_mooncake(peer: Peer) -> None:
    peer.call("fill", 4)
    before = peer.call("digest")
    expected = Authentication(Secret(b"a secret of sixteen bytes or more")).expect("x", "g")
    host, port = "127.0.0.1", client.fetch_metadata(peer.name, 5, Settings()).tcp_data_port
    for _ in range(3):
        refused = pytest.raises((AuthenticationError, TimeoutError))  # 0.3.10 waits for more
        with socket.create_connection((host, port), 5) as connection, refused:
            proofs.prove(connection, expected, "Mooncake", time.monotonic() + 0.3)
        with pytest.raises(AuthenticationError):
            client.probe(peer.name, 5, Settings(), expected=expected)
    assert client.probe(peer.name, 5, Settings()).generation == "" and peer.call("digest") == before
