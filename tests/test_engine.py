"""What an engine says to callers that ask for what cannot be, and where it listens."""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mooncake_hpc import READ, REQUEST, WRITE, TransferEngine
from mooncake_hpc.core.errors import (
    ConfigError,
    MooncakeError,
    PeerLost,
    RegistrationError,
    SegmentNotFound,
    TransferTimeout,
)
from mooncake_hpc.core.memory import describe
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata import open_store
from mooncake_hpc.testing.link import Link, linked
from mooncake_hpc.testing.peer import digest, pattern


@pytest.fixture
def engine() -> Iterator[TransferEngine]:
    with TransferEngine("misuse:1", "memory://misuse", protocol="tcp", bind_address="127.0.0.1") as engine:
        yield engine


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    with linked("tcp", 1 << 20) as link:
        link.run(link.request(READ, 0, 0, 1))
        yield link


@pytest.mark.parametrize(
    "requests",
    [[(READ, 0, 0, 0, 0)], np.zeros(3, np.int64), np.zeros((2, 2), REQUEST), np.zeros((), REQUEST), None],
    ids=["list", "numbers", "two dimensions", "none", "nothing"],
)
def test_what_is_no_array_of_requests(engine: TransferEngine, requests: Any) -> None:
    with pytest.raises(ConfigError, match=r"one-dimensional array of dtype mooncake_hpc\.REQUEST"):
        engine.submit(requests)


@pytest.mark.parametrize("metadata", ["memory://closed", "P2PHANDSHAKE"])
def test_a_closed_engine_says_so(metadata: str, caplog: pytest.LogCaptureFixture, no_leaks: None) -> None:
    with TransferEngine("closed:1", metadata, protocol="tcp", bind_address="127.0.0.1") as engine:
        name, memory = engine.name, engine.allocate(100)
        segment = engine.open_segment(name)
        requests = np.array([(READ, segment.id, memory.ctypes.data, memory.ctypes.data, 1)], REQUEST)
    calls: list[tuple[type[MooncakeError], Callable[[], object]]] = [
        (RegistrationError, lambda: engine.allocate(100)),
        (RegistrationError, lambda: engine.register(bytearray(100))),
        (PeerLost, lambda: engine.open_segment(name)),
        (PeerLost, lambda: engine.submit(requests)),
        (PeerLost, lambda: engine.read(memory, segment, memory.ctypes.data)),
    ]
    for error, call in calls:
        with pytest.raises(error, match=r"engine.* is closed"):
            call()
    engine.close()
    assert engine.notifications() == [] and not caplog.records


def test_a_read_that_times_out_has_been_cancelled(link: Link) -> None:
    local = link.local[:1000]
    link.peer.suspend()
    try:
        with pytest.raises(TransferTimeout, match=rf"{link.peer.name} is not done after 0\.2 s: cancelled"):
            link.engine.read(local, link.segment, link.remote, timeout=0.2)
    finally:
        link.peer.resume()
    link.engine.read(local, link.segment, link.remote)


def test_a_message_above_the_frame_limit_is_refused_here(link: Link) -> None:
    with pytest.raises(ConfigError, match="MC_HANDSHAKE_MAX_LENGTH=1048576"):
        link.engine.notify(link.segment, "much", "x" * (1 << 20))
    link.engine.notify(link.segment, "less", "x" * ((1 << 20) - 1000))
    assert [name for name, _ in link.peer.call("notifications")] == ["less"]


class Tensor:
    """As a CPU tensor: its memory is told by DLPack alone."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


class Interface:
    """Memory told by `__array_interface__` alone."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        self.__array_interface__ = array.__array_interface__


MEMORY: dict[str, Callable[[], Any]] = {
    "bytearray": lambda: bytearray(4000),
    "mmap": lambda: mmap.mmap(-1, 4096),
    "array": lambda: array.array("d", [0.0] * 500),
    "ctypes": lambda: (ctypes.c_int * 1000)(),
    "numpy": lambda: np.zeros((50, 10), np.float64),
    "array interface": lambda: Interface(np.zeros(1000, np.float32)),
    "DLPack": lambda: Tensor(np.zeros((10, 100), np.float32)),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_memory_of_any_kind_is_read_into_and_written_from(link: Link, kind: str) -> None:
    memory = MEMORY[kind]()
    link.engine.register(memory)
    link.peer.call("fill", link.remote, 3, 5000)
    link.engine.read(memory, link.segment, link.remote)
    nbytes = describe(memory).nbytes
    link.engine.write(memory, link.segment, link.remote + 10_000)
    assert link.remote_digest(10_000, nbytes) == link.remote_digest(0, nbytes) == digest(pattern(3, nbytes))
    link.engine.unregister(memory)


def test_registered_memory_lives_until_it_is_unregistered(link: Link) -> None:
    memory = Tensor(np.full(1000, 7, np.uint8))
    view, gone = np.from_dlpack(memory), weakref.ref(memory)
    place = describe(view)
    link.engine.register(memory)
    del memory, view
    gc.collect()
    assert gone() is not None
    record = (WRITE, link.segment.id, place.address, link.remote, 1000)
    del place
    link.run(record)
    assert link.remote_digest(0, 1000) == digest(np.full(1000, 7, np.uint8))
    link.engine.unregister(gone())
    gc.collect()
    assert gone() is None


def listening() -> set[str]:
    """Addresses at which this process takes TCP connections, as in /proc/net/tcp; ports left out."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            inodes.add(os.readlink(f"/proc/self/fd/{fd}").removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.parametrize(("bind_all", "expected"), [(False, "0700007F"), (True, "00000000")])
def test_both_ports_are_bound_to_the_published_address_only(bind_all: bool, expected: str) -> None:
    before = listening()
    settings = Settings(tcp_bind_address="127.0.0.7")
    with TransferEngine("bound:1", "memory://bound", protocol="tcp", bind_all=bind_all, settings=settings):
        assert listening() - before == {expected}


def test_a_peer_that_lives_is_kept_while_its_keys_are_gone() -> None:
    """Etcd may lose them for a moment; a process that has ended is told from that by asking it."""
    with open_store("memory://unpublished") as store:
        options: dict[str, Any] = {"protocol": "tcp", "bind_address": "127.0.0.1"}
        with TransferEngine("ours:1", store, **options) as ours:
            with TransferEngine("theirs:1", "memory://unpublished", **options) as theirs:
                local, remote = ours.allocate(4096), theirs.allocate(4096)
                remote[:] = 7
                segment = ours.open_segment("theirs:1")
                for key in ("mooncake/ram/theirs:1", "mooncake/rpc_meta/theirs:1"):
                    store._space.entries.pop(key)  # type: ignore[attr-defined]
                assert ours.open_segment("theirs:1") is segment
                assert segment.refresh().generation == theirs.generation
                ours.read(local, segment, int(remote.ctypes.data))
                assert (local == 7).all()
            with pytest.raises(PeerLost, match="is gone"):
                segment.refresh()
            with pytest.raises(SegmentNotFound):
                ours.open_segment("theirs:1")
