"""The TCP data port: frames of 24 bytes (u64 size, u64 address, u8 opcode, 7 bytes of a connection's id) and bodies.

The target's registered buffers lie in a memory file that we map too, with canary pages between them. A model of the
target reads the same bytes: every reply and every byte of the memory must be what it says, after each connection.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np

from fuzz import values
from fuzz.node import Commands
from fuzz.target import Case, Finding, Node, Target

PAGE = 4096
PAGES = 26
BASE = 0x6F00_0000_0000  # where the target has it: inputs hold addresses, and are to mean the same in another run
MAP_FIXED_NOREPLACE = 0x100000
GOOD, REFUSAL = struct.pack("<Q", 0x4D43545600000000), struct.pack("<Q", 0x4D43545600000001)
HEADER = struct.Struct("<QQQ")
READ_ONLY, HIDDEN = 1, 2
# begin, end, kind of each buffer: page borders and odd ones, two that touch, two that overlap, one for local use only
BUFFERS = (
    (2 * PAGE, 6 * PAGE, 0),
    (7 * PAGE + 100, 7 * PAGE + 1100, 0),
    (8 * PAGE, 10 * PAGE, READ_ONLY),
    (11 * PAGE, 13 * PAGE, 0),
    (13 * PAGE, 15 * PAGE, 0),
    (16 * PAGE, 17 * PAGE, 0),
    (16 * PAGE + 2048, 17 * PAGE + 2048, READ_ONLY),
    (20 * PAGE, 21 * PAGE, HIDDEN),
    (22 * PAGE + 1, 22 * PAGE + 2, 0),
)
OPEN = tuple((begin, end, kind) for begin, end, kind in BUFFERS if kind != HIDDEN)
MOST = (
    96 << 10
)  # bytes each way of a connection: what the socket buffers take, so that neither side waits for the other
LENGTHS = (1, 1, 2, 3, 7, 8, 8, 9, 23, 24, 25, 63, 64, 65, 255, 256, 1000, 1001, 2048, 4095, 4096, 4097, 8192, 16384)


@contextlib.contextmanager
def serve_data(fd: int) -> Iterator[tuple[Any, Commands]]:
    """The target: an engine whose registered memory lies in the memory file `fd`."""
    memory = map_memory(fd)
    with target_engine("tcp", memory) as engine:
        (transport,) = engine._transports
        yield {"port": transport.server.port, "name": engine.name}, {}


def map_memory(fd: int) -> Any:
    """The memory file at BASE."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4]
    flags = mmap.MAP_SHARED | MAP_FIXED_NOREPLACE
    assert libc.mmap(BASE, PAGES * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) == BASE, ctypes.get_errno()
    return np.ctypeslib.as_array((ctypes.c_uint8 * (PAGES * PAGE)).from_address(BASE))


@contextlib.contextmanager
def target_engine(protocol: str, memory: Any, settings: Any = None) -> Iterator[Any]:
    """An engine with the buffers registered."""
    from mooncake_hpc import TransferEngine

    options: dict[str, Any] = {"protocol": protocol, "bind_address": "127.0.0.1", "settings": settings}
    with TransferEngine("target:1", "P2PHANDSHAKE", **options) as engine:
        for begin, end, kind in BUFFERS:
            buffer = memory[begin:end]
            buffer.flags.writeable = kind != READ_ONLY
            engine.register(buffer, remote_accessible=kind != HIDDEN)
        yield engine


class DataPort(Target):
    name = "data"

    def __init__(self) -> None:
        super().__init__()
        self._fd = os.memfd_create("fuzz")
        os.ftruncate(self._fd, PAGES * PAGE)
        self._memory = np.frombuffer(mmap.mmap(self._fd, PAGES * PAGE), np.uint8)
        self._model = bytearray(Random(1).randbytes(PAGES * PAGE))
        self._silent: list[socket.socket] = []
        self._engine: Any = None

    def launch(self) -> Node:
        self._memory[:] = self._model
        node = Node("data", [self._fd])
        self._port = node.hello["port"]
        return node

    def stop(self) -> None:
        while self._silent:
            self._silent.pop().close()
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        super().stop()

    # --- input ----------------------------------------------------------------------------------------------

    def generate(self, chance: Random) -> Case:
        """One connection: frames that are served, behind one another, and mostly one at the end that is not."""
        count = chance.choice((0, 1, 2, 5, 20, 60, 200, 400, 1000))
        shortest = chance.random() < 0.7
        frames: list[bytes] = []
        sent = got = 0
        identity = 0 if chance.random() < 0.8 else values.border(chance) << 8 & (1 << 64) - 1
        random, choice, pack = chance.random, chance.choice, HEADER.pack
        while len(frames) < count:
            begin, end, kind = choice(OPEN)
            size = choice(LENGTHS)
            if shortest and size > 64:
                size &= 63
            size = min(size, end - begin) or 1
            place = random()
            at = (
                begin
                if place < 0.2
                else end - size
                if place < 0.4
                else begin + int(random() * (end - begin - size + 1))
            )
            writing = kind == 0 and random() < 0.5
            opcode = (0x80 if random() < 0.8 else 0) | writing
            if writing:
                sent += size
                frames.append(pack(size, BASE + at, identity | opcode) + chance.randbytes(size))
            else:
                got += size
                frames.append(pack(size, BASE + at, identity | opcode))
            if sent + 24 * len(frames) > MOST or got + 8 * len(frames) > MOST:
                break
        if random() < 0.8:
            frames.append(self._hostile(chance))
            frames += [choice(frames)[:2000] for _ in range(choice((0, 0, 1, 5)))]
        stream = b"".join(frames)
        if random() < 0.05:
            stream = values.mutate_bytes(chance, stream)
        if random() < 0.1:
            stream = stream[: chance.randrange(len(stream) + 1)]
        return [values.cut(chance, stream)]

    def _hostile(self, chance: Random) -> bytes:
        """A frame whose range is at, or over, a border of something."""
        begin, end, _ = chance.choice(BUFFERS)
        kind = chance.randrange(8)
        delta = chance.choice((-4096, -8, -1, 0, 1, 8, 4096))
        if kind == 0:
            address, size = BASE + begin + delta, end - begin + chance.choice((-1, 0, 1, 4096))
        elif kind == 1:
            address, size = BASE + end + delta, chance.choice((1, 2, 8, 4096))
        elif kind == 2:
            address, size = BASE + begin, values.border(chance)
        elif kind == 3:
            address, size = values.border(chance), chance.choice(LENGTHS)
        elif kind == 4:
            address, size = values.border(chance), values.border(chance)
        elif kind == 5:  # the sum is at the end of the address space, or around it
            address = values.border(chance) or 1
            size = (1 << 64) - address + delta
        elif kind == 6:
            address, size = BASE + begin - (1 << chance.choice((31, 32, 47, 62, 63))), end - begin
        else:
            address, size = BASE + chance.randrange(PAGES * PAGE), chance.choice(LENGTHS)
        opcode = chance.choice((0, 1, 0x80, 0x81, 0x80, 0x81, 2, 3, 0x7F, 0x82, 0xFE, 0xFF, chance.randrange(256)))
        padding = 0 if chance.random() < 0.8 else chance.getrandbits(56) << 8
        body = chance.randbytes(chance.choice((0, 1, 8, 25, 4096))) if opcode & 1 else b""
        return HEADER.pack(size & (1 << 64) - 1, address & (1 << 64) - 1, padding | opcode) + body

    # --- the model ------------------------------------------------------------------------------------------

    def predict(self, stream: bytes) -> bytes:
        """What the target answers to these bytes; what they change is changed in the model of its memory."""
        memory, end = self._model, len(stream)
        replies, at, unpack = [], 0, HEADER.unpack_from
        while end - at >= 24:
            size, address, word = unpack(stream, at)
            at += 24
            self.frames += 1
            writing = word & 127 == 1
            place = address - BASE
            if not size or not any(b <= place and place + size <= e and not (writing and k) for b, e, k in OPEN):
                if word & 128:
                    replies.append(REFUSAL)
                break
            if writing:
                body = stream[at : at + size]
                memory[place : place + len(body)] = body
                at += size
                if word & 128 and len(body) == size:
                    replies.append(GOOD)
                continue
            if word & 128:
                replies.append(GOOD)
            replies.append(memory[place : place + size])
        return b"".join(replies)

    def run(self, case: Case) -> None:
        for messages in case:
            expected = self.predict(b"".join(messages))
            try:
                got = self._exchange(messages, len(expected))
            except OSError as error:
                assert self.node is not None
                with contextlib.suppress(Exception):
                    self.node.process.wait(0.5)
                self.node.check_alive()
                raise Finding(f"no end of the connection: {error!r}") from error
            if got != expected:
                at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), "the end")
                raise Finding(f"a reply of {len(got)} bytes, not {len(expected)}; the first difference is at {at}")
            self.check_memory()

    def _exchange(self, messages: list[bytes], expected: int) -> bytes:
        with socket.create_connection(("127.0.0.1", self._port), 20) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for message in messages:
                client.sendall(message)
            client.shutdown(socket.SHUT_WR)
            parts = []
            while part := client.recv(1 << 18):
                parts.append(part)
            return b"".join(parts)

    def check_memory(self) -> None:
        if self._memory.data != self._model:
            wrong = np.flatnonzero(self._memory != np.frombuffer(bytes(self._model), np.uint8))
            begin, end = int(wrong[0]), int(wrong[-1]) + 1
            where = [f"{b:#x}-{e:#x}" for b, e, _ in BUFFERS if begin < e and b < end]
            self._model[:] = self._memory.tobytes()
            raise Finding(
                f"memory differs at {begin:#x} to {end:#x} of {PAGES * PAGE:#x}, buffers there: {where or 'none'}"
            )

    # --- the target as others see it ------------------------------------------------------------------------

    def serve_check(self) -> None:
        """A client of the product reads and writes; clients that stopped in the middle of a frame stay meanwhile."""
        from mooncake_hpc import TransferEngine
        from mooncake_hpc.core.errors import MooncakeError

        assert self.node is not None
        client = socket.create_connection(("127.0.0.1", self._port), 20)
        client.sendall(HEADER.pack(8, BASE + 2 * PAGE, 0x80)[: 1 + len(self._silent) % 23])
        self._silent.append(client)
        if len(self._silent) > 16:
            self._silent.pop(0).close()
        try:
            if self._engine is None:
                self._engine = TransferEngine("fuzz:1", "P2PHANDSHAKE", protocol="tcp", bind_address="127.0.0.1")
                self._local = self._engine.allocate(4 * PAGE)
            segment = self._engine.open_segment(self.node.hello["name"])
            for begin, end, _ in OPEN:
                self._engine.read(self._local[: end - begin], segment, BASE + begin, timeout=20)
                if self._local[: end - begin].tobytes() != self._model[begin:end]:
                    raise Finding("a client of the product read wrong bytes")
            self._local[:PAGE] = np.frombuffer(Random(self.frames).randbytes(PAGE), np.uint8)
            self._engine.write(self._local[:PAGE], segment, BASE + 3 * PAGE, timeout=20)
            self._model[3 * PAGE : 4 * PAGE] = self._local[:PAGE].tobytes()
        except MooncakeError as error:
            raise Finding(f"a client of the product is not served: {type(error).__name__}: {error}") from error
        self.check_memory()
