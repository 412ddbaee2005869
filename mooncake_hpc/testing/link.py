"""A pair of processes that transfer, and what tests do with it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mooncake_hpc import REQUEST, Segment, TransferEngine
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.testing.peer import Bytes, PeerProcess

HOST = "127.0.0.1"


def requests(*records: tuple[int, int, int, int, int]) -> npt.NDArray[Any]:
    """An array of (opcode, target id, local address, remote address, length)."""
    return np.array(list(records), REQUEST)


def address(memory: Bytes) -> int:
    return int(memory.ctypes.data)


@dataclass(frozen=True)
class Link:
    """Our engine, a node in another process, and memory of the same size on both sides."""

    engine: TransferEngine
    peer: PeerProcess
    segment: Segment
    local: Bytes
    remote: int  # address

    def request(self, opcode: int, ours: int, theirs: int, length: int) -> tuple[int, int, int, int, int]:
        """A record with offsets into the memories."""
        return opcode, self.segment.id, address(self.local) + ours, self.remote + theirs, length

    def run(self, *records: tuple[int, int, int, int, int], timeout: float = 30.0) -> None:
        self.engine.transfer(requests(*records), timeout)

    def hammer(self, memory: Bytes, write: bool) -> None:
        """Have the peer transfer all of our `memory` over and over; returns once it does."""
        self.peer.call("hammer", self.engine.name, address(memory), memory.size, write)
        deadline = time.monotonic() + 20
        while self.peer.call("hammered") < 2:
            assert time.monotonic() < deadline, self.peer.call("stop_hammer")
            time.sleep(0.005)

    def remote_digest(self, offset: int = 0, length: int | None = None) -> str:
        return str(self.peer.call("digest", self.remote, offset, length))


@contextlib.contextmanager
def linked(
    protocol: str,
    nbytes: int,
    metadata: str = "P2PHANDSHAKE",
    settings: Settings | None = None,
    peer_env: Mapping[str, str] | None = None,
) -> Iterator[Link]:
    """A fresh pair of processes."""
    with (
        PeerProcess(metadata, protocol, env=peer_env) as peer,
        TransferEngine("ours:1", metadata, protocol=protocol, bind_address=HOST, settings=settings) as engine,
    ):
        local, remote = engine.allocate(nbytes), peer.call("allocate", nbytes)
        yield Link(engine, peer, engine.open_segment(peer.name), local, remote)


class Linked:
    """What a class of tests is told of its transport. The tests share one pair of processes, but for the fatal ones."""

    protocol: str
    private = True  # whether it reaches memory of the caller's own, or only such as lies in memory files
    settings: Settings | None = None
    peer_env: Mapping[str, str] | None = None  # the peer's environment; None: this process's
    arena = 160 << 20  # bytes that the tests of a class share on each side

    @pytest.fixture(scope="class")
    @classmethod
    def link(cls) -> Iterator[Link]:
        with linked(cls.protocol, cls.arena, settings=cls.settings, peer_env=cls.peer_env) as link:
            yield link

    def fresh(self, nbytes: int) -> AbstractContextManager[Link]:
        """A pair of processes for one test."""
        return linked(self.protocol, nbytes, settings=self.settings, peer_env=self.peer_env)

    def another(self) -> PeerProcess:
        return PeerProcess("P2PHANDSHAKE", self.protocol, env=self.peer_env)

    def register(self, link: Link, nbytes: int, seed: int, readonly: bool = False) -> int:
        """The address of memory that the peer registers, neither for the whole of a memory file nor by allocate()."""
        return int(link.peer.call("register", nbytes, seed, readonly, self.private))


def run_threads(calls: Sequence[Callable[[], object]], timeout: float = 60.0) -> None:
    """Run all at once and wait for their end."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a thread is stuck"
