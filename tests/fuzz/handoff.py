"""The shared-memory hand-off: JSON frames over a Unix socket, and descriptors. Both sides are fuzzed.

A message that begins with FD is a byte with descriptors, named by letters: see `descriptors`.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np

from fuzz import values
from fuzz.node import Commands
from fuzz.target import Case, Finding, Node, Target

LENGTH = struct.Struct("<I")
FD = b"\xff<fd>"
PAGE_BYTES = 4096
FILE_BYTES = 1 << 16
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def descriptors(letters: str) -> list[int]:
    """What each letter stands for; the caller's to close."""
    return [_descriptor(letter) for letter in letters]


def _descriptor(letter: str) -> int:
    if letter in "fpsu":  # a file, a page: right; a short one; one that its sender may still cut short
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, {"f": FILE_BYTES, "p": PAGE_BYTES, "s": 100, "u": FILE_BYTES}[letter])
        if letter != "u":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return fd
    if letter == "e":  # sealed and empty
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return fd
    if letter == "w":  # sealed against writing, too
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, FILE_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_WRITE)
        return fd
    if letter == "n":
        return os.open("/dev/null", os.O_RDWR)
    if letter == "d":
        return os.open("/", os.O_RDONLY)
    if letter == "t":
        with tempfile.TemporaryFile() as file:
            file.truncate(FILE_BYTES)
            return os.dup(file.fileno())
    if letter == "x":
        return os.eventfd(0)
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()


def send(connection: socket.socket, messages: list[bytes]) -> None:
    """Send messages, those with descriptors as such. Raises OSError."""
    for message in messages:
        if not message.startswith(FD):
            connection.sendall(message)
            continue
        fds = descriptors(message[len(FD) :].decode("latin-1")[:200])
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            connection.sendmsg([b"\0"], rights)
        finally:
            for fd in fds:
                os.close(fd)


def framed(chance: Random, text: str) -> list[bytes]:
    """A frame in pieces, most often with the right length."""
    body = text.encode("utf-8", "surrogatepass")
    length = len(body) if chance.random() < 0.93 else values.border(chance) & 0xFFFFFFFF
    return values.cut(chance, LENGTH.pack(length) + body)


# --- what hands out --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve_handoff() -> Iterator[tuple[Any, Commands]]:
    """The target: an engine with some memory files."""
    from mooncake_hpc import TransferEngine
    from mooncake_hpc.testing.peer import fill

    with TransferEngine("target:1", "P2PHANDSHAKE", protocol="shm", bind_address="127.0.0.1") as engine:
        memory = [engine.allocate(FILE_BYTES) for _ in range(3)]
        for seed, file in enumerate(memory):
            fill(file, seed + 1)
        (transport,) = engine._transports
        addresses = [int(file.ctypes.data) for file in memory]
        yield {"socket": transport._server.address, "name": engine.name, "addresses": addresses}, {}


class Handoff(Target):
    name = "handoff"
    _engine: Any = None

    def launch(self) -> Node:
        return Node("handoff")

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        super().stop()

    def generate(self, chance: Random) -> Case:
        case = []
        for _ in range(chance.choice((1, 1, 4))):
            messages: list[bytes] = []
            for _ in range(chance.choice((1, 1, 2, 5))):
                value: dict[str, Any] = {"have": chance.choice(([], [1], [1, 2, 3], list(range(500))))}
                if chance.random() < 0.2:
                    value = {chance.choice(("hello", "proof")): chance.randbytes(chance.choice((0, 16, 32, 129))).hex()}
                text = values.mutate_json(chance, value) if chance.random() < 0.6 else values.dump(value)
                messages += framed(chance, text)
                if chance.random() < 0.15:
                    messages.append(FD + bytes(chance.choices(b"fpsuewndtxk", k=chance.choice((0, 1, 3, 200)))))
                self.frames += 1
            case.append(messages)
        return case

    def run(self, case: Case) -> None:
        assert self.node is not None
        for messages in case:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(20)
                try:
                    client.connect("\0" + self.node.hello["socket"])
                    with contextlib.suppress(ConnectionError):
                        send(client, messages)
                    with contextlib.suppress(OSError):  # reset already
                        client.shutdown(socket.SHUT_WR)
                    self._take(client)
                except TimeoutError as error:
                    raise Finding(f"the hand-off has no end within 20 s: {error!r}") from error
                except OSError as error:
                    self.node.check_alive()
                    raise Finding(f"no hand-off: {error!r}") from error

    def _take(self, client: socket.socket) -> None:
        """All that comes, descriptors closed."""
        with contextlib.suppress(ConnectionError):
            while True:
                data, fds, _, _ = socket.recv_fds(client, 1 << 16, 64)
                for fd in fds:
                    os.close(fd)
                if not data:
                    return

    def serve_check(self) -> None:
        from mooncake_hpc import TransferEngine
        from mooncake_hpc.core.errors import MooncakeError
        from mooncake_hpc.testing.peer import pattern

        assert self.node is not None
        try:
            if self._engine is None:
                self._engine = TransferEngine("fuzz:1", "P2PHANDSHAKE", protocol="shm", bind_address="127.0.0.1")
                self._local = self._engine.allocate(FILE_BYTES)
            for seed, address in enumerate(self.node.hello["addresses"]):
                segment = self._engine.open_segment(self.node.hello["name"])
                self._engine.read(self._local, segment, address, timeout=20)
                if not np.array_equal(self._local, pattern(seed + 1, FILE_BYTES)):
                    raise Finding("a client of the product read wrong bytes")
        except MooncakeError as error:
            raise Finding(f"a client of the product is not served: {type(error).__name__}: {error}") from error
        self.node.call("settle")


# --- what it is handed out to ----------------------------------------------------------------------------------


@contextlib.contextmanager
def serve_reader() -> Iterator[tuple[Any, Commands]]:
    """The target: an engine that opens segments whose hand-over socket is ours."""
    from mooncake_hpc import TransferEngine
    from mooncake_hpc.core.errors import MooncakeError
    from mooncake_hpc.metadata.store import open_store
    from mooncake_hpc.wire.descriptor import BufferDescriptor, SegmentDescriptor

    store = open_store("memory://reader")
    count = 0
    with TransferEngine("reader:1", store, protocol="shm", bind_address="127.0.0.1") as engine:
        local = engine.allocate(FILE_BYTES)

        def visit(address: str, ranges: list[tuple[int, int]]) -> str:
            """Open a segment and read and write its buffers; the last error's type."""
            nonlocal count
            count += 1
            name = f"server-{count}:1"
            buffers = tuple(BufferDescriptor(a, n, "cpu:0") for a, n in ranges)
            descriptor = SegmentDescriptor(name, buffers, generation="g", shm_socket=address)
            store.publish(f"mooncake/rpc_meta/{name}", json.dumps({"ip_or_host_name": "127.0.0.1", "rpc_port": 1}))
            store.publish(f"mooncake/ram/{name}", descriptor.to_json())
            last = ""
            try:
                segment = engine.open_segment(name)
                for begin, length in ranges[:8]:
                    for at in (begin, begin + max(0, length - 100), begin + length - 1):
                        size = min(100, FILE_BYTES)
                        try:
                            engine.read(local[:size], segment, at, timeout=0.2)
                            engine.write(local[:size], segment, at, timeout=0.2)
                            segment.mapped(at, size)
                        except MooncakeError as error:
                            last = type(error).__name__
                segment.close("the fuzzer has seen enough")
            except MooncakeError as error:
                last = type(error).__name__
            finally:
                engine._by_name.pop(name, None)
                store.withdraw(f"mooncake/rpc_meta/{name}")
                store.withdraw(f"mooncake/ram/{name}")
            return last

        yield {}, {"visit": visit}
        store.close()


class Reader(Target):
    name = "reader"
    unit = "replies"
    most = Target.most | {"rss_kib": 192 << 10}  # engines keep segments, by their numbers, until they are closed

    def __init__(self) -> None:
        super().__init__()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("")  # an abstract name of the kernel's choice
        self._listener.listen(8)
        self._address = self._listener.getsockname()[1:].decode()

    def launch(self) -> Node:
        return Node("reader")

    def generate(self, chance: Random) -> Case:
        """The first list has the ranges that the reader is to touch; the second what it is told, reply by reply."""
        files, where = [], 0x7000_0000_0000
        for serial in range(chance.choice((0, 1, 1, 2, 5))):
            files.append([serial + 1, where, FILE_BYTES])
            where += FILE_BYTES * chance.choice((1, 1, 2))
        ranges = [[address, nbytes] for _, address, nbytes in files] or [[where, 100]]
        replies: list[bytes] = []
        for version in range(1, chance.choice((2, 2, 3))):
            value = {
                "version": chance.choice((version, 1, 0, 1 << 40)), "page": version == 1, "files": files,
                "new": [serial for serial, _, _ in files] if version == 1 else [],
                "buffers": [[address, nbytes, chance.random() < 0.3] for address, nbytes in ranges],
            }  # fmt: skip
            changed = chance.random() < 0.7
            replies += framed(chance, values.mutate_json(chance, value) if changed else values.dump(value))
            if version == 1:
                letters = "p" + "f" * len(files)
                if chance.random() < 0.4:
                    letters = "".join(chance.choices("fpsuewndtxk", k=len(letters) + chance.choice((-1, 0, 0, 3))))
                if chance.random() < 0.1:
                    replies.append(FD + letters.encode())
                elif chance.random() < 0.1:
                    replies += [FD] * len(letters)
                else:
                    replies += [FD + letter.encode() for letter in letters]
        self.frames += 1
        return [[json.dumps(ranges).encode()], replies]

    def run(self, case: Case) -> None:
        assert self.node is not None
        if len(case) < 2 or not case[0]:
            return
        try:
            ranges = [(int(a) & (1 << 62) - 1, int(n) & 0xFFFFFF) for a, n in json.loads(case[0][0])]
        except (ValueError, TypeError):
            return  # made so by the shrinker
        server = threading.Thread(target=self._serve, args=(case[1],), daemon=True)
        server.start()
        self.node.call("visit", self._address, ranges, timeout=60)
        server.join(30)

    def _serve(self, replies: list[bytes], patience: float = 0.08) -> None:
        """What the next client is told at once, whatever it asks; who waits for more is left after so many seconds."""
        self._listener.settimeout(2)
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(2)
                send(connection, replies)
                connection.settimeout(patience)
                with contextlib.suppress(TimeoutError):
                    while connection.recv(1 << 16):
                        pass
                connection.shutdown(socket.SHUT_WR)  # for those that wait for more

    def serve_check(self) -> None:
        """A server that does nothing wrong is read."""
        assert self.node is not None
        self.node.call("settle")
        value = {"version": 0, "page": True, "files": [[1, 1 << 40, FILE_BYTES]], "new": [1]}
        value["buffers"] = [[1 << 40, FILE_BYTES, False]]
        data = json.dumps(value).encode()
        server = threading.Thread(
            target=self._serve, args=([LENGTH.pack(len(data)) + data, FD + b"p", FD + b"f"], 20.0), daemon=True
        )
        server.start()
        got = self.node.call("visit", self._address, [[1 << 40, FILE_BYTES - 200]], timeout=60)
        server.join(30)
        if got not in ("", "AddressRejected"):
            raise Finding(f"a server that does nothing wrong is not read: {got}")
