"""Segments and peers that say what none of ours would: typed errors, nothing left behind, and others go on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mooncake_hpc import TransferEngine
from mooncake_hpc.core.errors import ConfigError, MalformedRecord, MooncakeError, NameInUse, PeerLost
from mooncake_hpc.core.memory import SIZE_SEALS
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.memory import MemoryStore
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.transports.shm import handoff
from mooncake_hpc.wire.descriptor import SegmentDescriptor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

SIZE = 1 << 16
WHERE = 1 << 40
SETTINGS = Settings(lease_ttl=1.0, transfer_timeout=10.0)
GARBAGE = [
    "",
    "x",
    "[]",
    "null",
    "{}",
    '{"name":1e999}',
    "[" * 100_000,
    '{"name":"a","buffers":[{"addr":-1,"length":1}]}',
]


@contextlib.contextmanager
def engines(space: str, protocol: str = "tcp") -> Iterator[tuple[TransferEngine, TransferEngine, MemoryStore]]:
    """Two, and somebody who writes into the same store."""
    spec = f"memory://{space}"
    with (
        MemoryStore(space) as evil,
        TransferEngine("good:1", spec, protocol=protocol, settings=SETTINGS) as good,
        TransferEngine("here:1", spec, protocol=protocol, settings=SETTINGS) as here,
    ):
        yield good, here, evil


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_one_malformed_segment_among_good_ones(text: str, request: pytest.FixtureRequest) -> None:
    with engines(request.node.name) as (good, here, evil):
        evil.publish("mooncake/ram/bad:1", text)
        evil.publish("mooncake/rpc_meta/bad:1", text)
        with pytest.raises(MalformedRecord, match=r"mooncake/ram/bad:1"):
            here.open_segment("bad:1")
        with pytest.raises(MalformedRecord, match=r"mooncake/rpc_meta/bad:1"):
            here.probe("bad:1")
        remote, local = good.allocate(SIZE), here.allocate(SIZE)
        remote[:] = 7
        here.read(local, here.open_segment("good:1"), int(remote.ctypes.data))
        assert (local == 7).all()


def test_whoever_has_a_name_in_fact_puts_its_entry_right(request: pytest.FixtureRequest) -> None:
    with engines(request.node.name) as (_, here, evil):
        evil.publish("mooncake/ram/bad:1", "x")
        evil.publish("mooncake/rpc_meta/bad:1", "x")
        with TransferEngine("bad:1", f"memory://{request.node.name}", protocol="tcp", settings=SETTINGS):
            assert here.probe("bad:1") and here.open_segment("bad:1")


def test_a_segment_that_becomes_malformed_while_it_is_in_use(request: pytest.FixtureRequest) -> None:
    """Who has it open goes on, as the peer itself says that it is the same; whoever opens it anew is told the key."""
    with engines(request.node.name) as (good, here, evil):
        remote, local = good.allocate(SIZE), here.allocate(SIZE)
        segment = here.open_segment("good:1")
        here.read(local, segment, int(remote.ctypes.data))
        right = evil.get("mooncake/ram/good:1") or ""
        evil.publish("mooncake/ram/good:1", '{"name":"good:1","buffers":[{"addr":1e999,"length":1}]}')
        here.read(local, segment, int(remote.ctypes.data))
        with pytest.raises(NameInUse):
            good.register(np.zeros(10, np.uint8))
        assert here.open_segment("good:1") is segment and segment.refresh() == segment.descriptor
        with pytest.raises(MalformedRecord, match=r"mooncake/ram/good:1.*addr"):
            good.open_segment("good:1")
        local[:] = 1
        segment.routes[0].lanes[0].interrupt()  # its connection breaks
        here.read(local, segment, int(remote.ctypes.data))
        assert not local.any()
        evil.publish("mooncake/ram/good:1", right)
        here.read(local, here.open_segment("good:1"), int(remote.ctypes.data))


def memory_file(nbytes: int, seals: int = SIZE_SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@contextlib.contextmanager
def handing_over(reply: Any, sizes: list[int], seals: int = SIZE_SEALS) -> Iterator[str]:
    """A hand-over socket that gives every client this reply, and memory files of these sizes."""

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            fds = [memory_file(size, seals) for size in sizes]
            with client, contextlib.suppress(OSError):
                client.settimeout(1)
                handoff.receive(client, handoff.read_request)
                handoff.send(client, reply, fds)
                client.recv(1)
            for fd in fds:
                os.close(fd)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("")
        listener.listen(8)
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1:].decode()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


RIGHT = {"version": 0, "page": True, "files": [[1, WHERE, SIZE]], "new": [1], "buffers": [[WHERE, SIZE, False]]}


@pytest.mark.parametrize(
    ("changes", "sizes", "cause"),
    [
        ({}, [4096, SIZE - 4096], "memory file 1 has 61440 bytes, not 65536"),
        ({}, [100, SIZE], "the page has 100 bytes"),
        ({"page": False}, [SIZE], "the page comes once"),
        ({"new": []}, [4096], "memory file 1 was not handed over"),
        ({"new": [1, 2]}, [4096, SIZE, SIZE], "a new file is none of the files"),
        ({"new": [1, 1]}, [4096, SIZE, SIZE], "a file is named twice"),
        ({"files": [[1, (1 << 64) - 1, SIZE]]}, [4096, SIZE], "not within 64 bits"),
        ({"buffers": [[-1, 5, False]]}, [4096, SIZE], "buffers"),
        ({"version": 1e999}, [4096, SIZE], "malformed|version"),
        ({"files": [[n, WHERE, 1] for n in range(70_000)]}, [4096, SIZE], "length <= 65536"),
    ],
)
def test_memory_that_is_not_as_its_owner_says(
    changes: dict[str, Any], sizes: list[int], cause: str, request: pytest.FixtureRequest
) -> None:
    with (
        engines(request.node.name, "shm") as (_, here, evil),
        handing_over({**RIGHT, **changes}, sizes) as address,
    ):
        here.allocate(4096)
        bad = SegmentDescriptor("bad:1", shm_socket=address, generation="g")
        evil.publish("mooncake/ram/bad:1", bad.to_json())
        evil.publish("mooncake/rpc_meta/bad:1", '{"ip_or_host_name":"127.0.0.1","rpc_port":1}')
        for _ in range(2):
            with pytest.raises(PeerLost, match=f"'bad:1': its shared memory cannot be mapped: .*({cause})"):
                here.open_segment("bad:1")


def test_memory_of_a_peer_that_is_right_is_read(request: pytest.FixtureRequest) -> None:
    """The control of the test above; beyond its file a buffer cannot be read, whatever its owner says."""
    reply = {**RIGHT, "buffers": [[WHERE, 2 * SIZE, False]]}
    with engines(request.node.name, "shm") as (_, here, evil), handing_over(reply, [4096, SIZE]) as address:
        local = here.allocate(2 * SIZE)
        local[:] = 7
        found = SegmentDescriptor("other:1", shm_socket=address, generation="g")
        evil.publish("mooncake/ram/other:1", replace(found, tcp_data_port=1, tcp_data_host="127.0.0.1").to_json())
        evil.publish("mooncake/rpc_meta/other:1", '{"ip_or_host_name":"127.0.0.1","rpc_port":1}')
        segment = here.open_segment("other:1")
        here.read(local[:SIZE], segment, WHERE)
        assert not local[:SIZE].any() and (local[SIZE:] == 7).all()
        with pytest.raises(MooncakeError):
            here.read(local, segment, WHERE)


def test_the_json_of_the_hand_over_is_as_ever() -> None:
    """Both sides of older processes read it."""
    text = json.dumps(RIGHT)
    reply = handoff.read_reply(text, "it")
    assert (reply.version, reply.page, reply.new) == (0, True, (1,))
    assert handoff.read_request('{"have": [1, 2]}', "it").have == (1, 2)


@pytest.mark.parametrize("location", ["a\0", "\udcff", "x" * 600])
def test_a_location_that_peers_would_refuse(location: str, request: pytest.FixtureRequest) -> None:
    with engines(request.node.name) as (good, here, _):
        for register in (good.register, good.allocate):
            with pytest.raises(ConfigError, match="a location"):
                register(100 if register == good.allocate else np.zeros(10, np.uint8), location)  # type: ignore[operator]
        assert here.open_segment("good:1").buffers == ()


def test_etcd_is_told_texts_only(etcd: str) -> None:
    with open_store(etcd, SETTINGS) as store:
        for call in (store.get, store.list, lambda key: store.publish(key, "x")):
            with pytest.raises(ConfigError, match="surrogates"):
                call("odd/\ud800")
        for put in (store.publish, store.create):
            with pytest.raises(ConfigError, match="surrogates"):
                put("odd/a", "\ud800")
        store.publish("odd/a", "fine")
        assert store.list("odd/") == {"odd/a": "fine"}
