"""A node in a process of its own, driven line by line: what conformance suites and fault tests talk to.

`PeerProcess` is the test's side; `python -m mooncake_hpc.testing.peer` is the node. Over its standard input and
output go JSON lines: a command with its arguments, and a result or an error. The node ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mooncake_hpc import READ, REQUEST, WRITE, TransferEngine
from mooncake_hpc.core.errors import MooncakeError
from mooncake_hpc.native.prepare import checksum
from mooncake_hpc.testing.fork_server import Forked, Nursery
from mooncake_hpc.transports.tcp.server import TcpServer

Bytes = npt.NDArray[np.uint8]

STEP = 1 << 20  # bytes that `fill` makes at a time, a multiple of its block


def fill(memory: Bytes, seed: int) -> None:
    """Fill with random bytes, the same ones for a seed in every process; no two blocks of 64 KiB are equal."""
    block = np.random.Generator(np.random.SFC64(seed)).integers(0, 1 << 64, 8192, np.uint64)
    for start in range(0, memory.size, STEP):
        part = memory[start : start + STEP]
        numbers = np.arange(start // block.nbytes, (start + STEP) // block.nbytes, dtype=np.uint64)
        part[:] = (block ^ numbers[:, None]).view(np.uint8).reshape(-1)[: part.size]


def pattern(seed: int, nbytes: int) -> Bytes:
    """What `fill` writes."""
    memory = np.empty(nbytes, np.uint8)
    fill(memory, seed)
    return memory


def digest(data: Bytes) -> str:
    """What two processes compare instead of the bytes."""
    return f"{checksum(data):016x}"


nursery: Nursery | None = None  # where new peers come from; None: each is a process from the start


def _state(task: Path) -> str:
    """The state letter of a thread, as in its `stat` file; T is stopped, also once it has ended."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "T"


class PeerError(Exception):
    """A command failed in the peer; the text begins with the error's type."""


class PeerProcess:
    """Start a node and wait until its engine runs. A context manager; the node never outlives it.

    `env` replaces the environment. Raises PeerError, TimeoutError.
    """

    def __init__(
        self,
        metadata: str,
        protocol: str,
        name: str = "peer:1",
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        arguments = [metadata, protocol, name]
        self.process: subprocess.Popen[bytes] | Forked
        if nursery is not None:
            self.process = nursery.start(arguments, env)
        else:
            command = [sys.executable, "-m", "mooncake_hpc.testing.peer", *arguments]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self._received = b""
        try:
            self.name: str = self._reply(timeout)  # as published
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def call(self, command: str, *arguments: Any, timeout: float = 60.0) -> Any:
        """The result of a method of `Node`. Raises PeerError, TimeoutError."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
        self.process.stdin.flush()
        return self._reply(timeout)

    def suspend(self) -> None:
        """SIGSTOP: its sockets stay open, and nothing answers. Returns when every thread has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        while any(_state(task) != "T" for task in Path(f"/proc/{self.process.pid}/task").iterdir()):
            time.sleep(0.001)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.close()

    def close(self) -> None:
        """Let it end by itself; killed when it does not within 10 s. Idempotent."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self.resume()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _reply(self, timeout: float) -> Any:
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"peer {self.process.pid} has not answered within {timeout:g} s")
            got = os.read(self.process.stdout.fileno(), 1 << 16)
            if not got:
                raise PeerError(f"peer {self.process.pid} has ended")
            self._received += got
        line, self._received = self._received.split(b"\n", 1)
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply["result"]


class Node:
    """The commands of a peer: public methods, called with what came in the line."""

    def __init__(self, engine: TransferEngine) -> None:
        self._engine = engine
        self._memory: dict[int, Bytes] = {}  # by address
        self._hammer: threading.Thread | None = None
        self._stop_hammer = threading.Event()
        self._hammered: list[Any] = []

    def allocate(
        self, nbytes: int, seed: int = 0, remote_accessible: bool = True, writable_by_peers: bool = True
    ) -> int:
        """Shared memory, zeroed or with a pattern; its address."""
        memory = self._engine.allocate(nbytes, remote_accessible=remote_accessible, writable_by_peers=writable_by_peers)
        if seed:
            fill(memory, seed)
        return self._keep(memory)

    def register(self, nbytes: int, seed: int = 0, readonly: bool = False, private: bool = True) -> int:
        """Memory of the process's own, or part of a memory file, registered; its address."""
        memory = self._make(nbytes, private)
        if seed:
            fill(memory, seed)
        memory.flags.writeable = not readonly
        self._engine.register(memory)
        return self._keep(memory)

    def register_parts(self, nbytes: int, cuts: Sequence[Sequence[int]], private: bool = True) -> int:
        """One allocation, of which each [begin, end) is registered for itself; its address."""
        memory = self._make(nbytes, private)
        self._engine.register_many([memory[begin:end] for begin, end in cuts])
        return self._keep(memory)

    def unregister(self, address: int) -> float:
        """Undo `allocate` or `register`, the memory kept for `digest` all the same; seconds that it took."""
        began = time.monotonic()
        self._engine.unregister(self._memory[address])
        return time.monotonic() - began

    def drop(self, address: int) -> None:
        """Unregister and forget."""
        self._engine.unregister(self._memory.pop(address))

    def fill(self, address: int, seed: int, length: int | None = None) -> None:
        fill(self._memory[address][:length], seed)

    def digest(self, address: int, offset: int = 0, length: int | None = None) -> str:
        end = None if length is None else offset + length
        return digest(self._memory[address][offset:end])

    def uniform(self, address: int) -> int:
        """The one byte that all of a buffer holds, or -1."""
        memory = self._memory[address]
        return int(memory[0]) if (memory == memory[0]).all() else -1

    def notify(self, segment: str, name: str, text: str) -> None:
        self._engine.notify(self._engine.open_segment(segment), name, text)

    def notifications(self) -> list[tuple[str, str]]:
        return self._engine.notifications()

    def cut_connections(self) -> int:
        """Break every data connection to us from this side; how many there were."""
        servers = (getattr(transport, "server", None) for transport in self._engine._transports)
        return sum(server.cut() for server in servers if isinstance(server, TcpServer))

    def hammer(self, segment: str, address: int, length: int, write: bool, value: int = 0) -> None:
        """Transfer the same range over and over from a thread, until `stop_hammer` or an error; bytes are `value`."""
        memory = self._engine.allocate(length)
        memory[:] = value
        self._memory[memory.ctypes.data] = memory
        target = self._engine.open_segment(segment)
        record = (WRITE if write else READ, target.id, memory.ctypes.data, address, length)
        requests = np.array([record] * 4, REQUEST)
        self._stop_hammer.clear()
        self._hammered = [0, ""]
        self._hammer = threading.Thread(target=self._run_hammer, args=(requests,), daemon=True)
        self._hammer.start()

    def hammered(self) -> int:
        """Batches done so far."""
        return int(self._hammered[0])

    def stop_hammer(self) -> list[Any]:
        """[batches done, the error that ended it or ""]."""
        assert self._hammer is not None
        self._stop_hammer.set()
        self._hammer.join(30)
        return self._hammered

    def _make(self, nbytes: int, private: bool) -> Bytes:
        if private:
            return np.zeros(nbytes, np.uint8)
        return self._engine.allocate(nbytes, remote_accessible=False).view()

    def _run_hammer(self, requests: npt.NDArray[Any]) -> None:
        try:
            while not self._stop_hammer.is_set():
                self._engine.submit(requests).wait(20)
                self._hammered[0] += 1
        except MooncakeError as error:
            self._hammered[1] = f"{type(error).__name__}: {error}"

    def _keep(self, memory: Bytes) -> int:
        address = int(memory.ctypes.data)
        self._memory[address] = memory
        return address


def run(arguments: Sequence[str]) -> None:
    """Be the node METADATA PROTOCOL NAME, until standard input ends."""
    metadata, protocol, name = arguments
    replies = os.fdopen(os.dup(1), "w")  # print() of others would end up between our lines
    os.dup2(2, 1)

    def answer(**reply: Any) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        engine = TransferEngine(name, metadata, protocol=protocol, bind_address="127.0.0.1")
    except MooncakeError as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    with engine:
        node = Node(engine)
        answer(result=engine.name)
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            try:
                answer(result=getattr(node, command)(*arguments))
            except Exception as error:
                answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    run(sys.argv[1:])
