"""Every port of an engine that has a secret, to clients that do not know it: they read, write and learn nothing.

An item's first message is its port: `data`, `rpc` or `shm`. The message ECHO stands for bytes that the server has sent
on this connection: what a client has to answer with that can only reflect.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import rpc_port, values
from fuzz.data_port import BASE, BUFFERS, HEADER, OPEN, PAGE, DataPort, map_memory, target_engine
from fuzz.node import Commands
from fuzz.target import Case, Finding, Node

OPCODE = 0xA0
UNPROVED, CHALLENGE = struct.pack("<Q", 0x4D43545600000002), struct.pack("<Q", 0x4D43545600000003)
CHALLENGE_BYTES = 96
ECHO = b"\xff<echo>"
SECRET = "a secret of enough bytes"
RPC_LENGTH, SHM_LENGTH = struct.Struct("<Q"), struct.Struct("<I")


def settings_of(path: str) -> Any:
    from mooncake_hpc.core.settings import Settings

    return Settings(secret_file=path)


@contextlib.contextmanager
def serve_stranger(fd: int) -> Iterator[tuple[Any, Commands]]:
    """The target: as the data port's, with a secret, and with shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "secret")
        path.touch(0o600)
        path.write_text(SECRET)
        with target_engine("auto", map_memory(fd), settings_of(str(path))) as engine:
            engine.allocate(PAGE)
            shm, tcp = engine._transports
            hello = {"port": tcp.server.port, "name": engine.name, "socket": shm._server.address}
            hello |= {"generation": engine.generation, "secret": str(path)}
            yield hello, {"notifications": engine.notifications}


class Stranger(DataPort):
    name = "stranger"

    def launch(self) -> Node:
        self._memory[:] = self._model
        node = Node("stranger", [self._fd])
        self._port = node.hello["port"]
        host, _, port = node.hello["name"].rpartition(":")
        self._addresses: dict[bytes, Any] = {
            b"data": ("127.0.0.1", self._port),
            b"rpc": (host, int(port)),
            b"shm": "\0" + node.hello["socket"],
        }
        return node

    def generate(self, chance: Random) -> Case:
        case = []
        for _ in range(chance.choice((1, 4))):
            port = chance.choice((b"data", b"data", b"rpc", b"shm"))
            messages = {b"data": self._data, b"rpc": self._rpc, b"shm": self._shm}[port](chance)
            if chance.random() < 0.2:
                place = chance.randrange(len(messages))
                if messages[place] != ECHO:
                    messages[place] = values.mutate_bytes(chance, messages[place])
            if chance.random() < 0.1 and ECHO not in messages:
                messages = values.cut(chance, b"".join(messages)[: chance.choice((8, 24, 96, 97, 130, 4000))])
            self.frames += len(messages)
            case.append([port, *messages])
        return case

    def _proof(self, chance: Random) -> bytes:
        return ECHO if chance.random() < 0.5 else chance.randbytes(chance.choice((0, 31, 32, 32, 32, 33, 96)))

    def _data(self, chance: Random) -> list[bytes]:
        messages = []
        if chance.random() < 0.8:
            words = [chance.getrandbits(64) for _ in range(chance.choice((3, 4, 4, 4, 5)))]
            opcode = OPCODE if chance.random() < 0.9 else chance.randrange(256)
            messages.append(b"".join(HEADER.pack(0, word, opcode) for word in words))
            messages.append(self._proof(chance))
        for _ in range(chance.choice((1, 3))):
            begin, end, _kind = chance.choice(BUFFERS)
            size = chance.choice((1, 8, end - begin))
            opcode = chance.choice((0, 1, 0x80, 0x81))
            body = chance.randbytes(size) if opcode & 1 else b""
            messages.append(HEADER.pack(size, BASE + begin, opcode) + body)
        return messages

    def _rpc(self, chance: Random) -> list[bytes]:
        request = chance.choice((b"\1{}", b"\3{}", b"\3" + b'{"fence":"00000000000001","timeout":0.1}', b"\0{}", b"{}"))
        if chance.random() < 0.3:
            request = b"\2" + json.dumps({"name": "stranger", "notify_msg": "let me in"}).encode()
        if chance.random() < 0.3:
            kind, value = rpc_port.requests(chance)
            text = values.mutate_json(chance, value) if chance.random() < 0.5 else values.dump(value)
            return values.cut(chance, rpc_port.frame(chance, kind, text))
        nonce = chance.randbytes(chance.choice((0, 31, 32, 32, 32))).hex().encode()
        hello = bytes([OPCODE]) + chance.choice((b"H", b"H", b"H", b"C", b"Q", b"R", b"X")) + nonce
        messages = [RPC_LENGTH.pack(len(hello)) + hello]
        length = 2 + 32 + len(request)
        messages.append(RPC_LENGTH.pack(length) + bytes([OPCODE]) + b"Q")
        return [*messages, self._proof(chance), request]

    def _shm(self, chance: Random) -> list[bytes]:
        frames: list[Any] = [{"have": []}] * chance.choice((1, 2))
        if chance.random() < 0.8:
            nonce = chance.randbytes(chance.choice((32, 32, 32, 0, 16))).hex()
            frames = [{"hello": nonce}, {"proof": chance.randbytes(32).hex()}, *frames]
        texts = [values.mutate_json(chance, f) if chance.random() < 0.2 else json.dumps(f) for f in frames]
        return [SHM_LENGTH.pack(len(text)) + text for text in (t.encode("utf-8", "surrogatepass") for t in texts)]

    # --- what must come of it ---------------------------------------------------------------------------------

    def run(self, case: Case) -> None:
        assert self.node is not None
        for messages in case:
            if not messages or messages[0] not in self._addresses:
                continue
            port, *sent = messages
            try:
                got, fds = self._talk(port, sent)
            except OSError as error:
                self.node.check_alive()
                raise Finding(f"{port!r}: no end of the connection: {error!r}") from error
            if fds or not self._is_refusal(port, got):
                raise Finding(f"port {port!r} told a stranger {got[:300]!r}, with {fds} descriptors")
            self.check_memory()

    def _talk(self, port: bytes, messages: list[bytes]) -> tuple[bytes, int]:
        """All that comes, and how many descriptors."""
        address = self._addresses[port]
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        got, fds = b"", 0
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.settimeout(20)
            client.connect(address)
            with contextlib.suppress(ConnectionError):
                for message in messages:
                    if message == ECHO:
                        client.settimeout(0.05)
                        with contextlib.suppress(TimeoutError):
                            got += client.recv(4096)
                        client.settimeout(20)
                        message = got[-32:] if len(got) % 2 else got[-96:-64] or got[-32:]
                    client.sendall(message)
                with contextlib.suppress(OSError):  # reset already
                    client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while True:
                    data, received, _, _ = socket.recv_fds(client, 1 << 16, 64)
                    got += data
                    for fd in received:
                        fds += 1
                        os.close(fd)
                    if not data:
                        break
        return got, fds

    def _is_refusal(self, port: bytes, got: bytes) -> bool:
        """Whether it is nothing but what anybody may know."""
        if port == b"data":
            rest = got[8 + CHALLENGE_BYTES :] if got.startswith(CHALLENGE) else got
            return rest in (b"", UNPROVED)
        if port == b"rpc":
            while got:
                (length,) = RPC_LENGTH.unpack(got[:8])
                body, got = got[8 : 8 + length], got[8 + length :]
                if not (body[0] == OPCODE and body[1:2] in (b"C", b"X") and len(body) <= 2 + CHALLENGE_BYTES):
                    return False
            return True
        while got:
            (length,) = SHM_LENGTH.unpack(got[:4])
            body, got = json.loads(got[4 : 4 + length]), got[4 + length :]
            if not (isinstance(body, dict) and body.keys() <= {"challenge", "refused"}):
                return False
        return True

    def serve_check(self) -> None:
        """Who knows the secret is served, and nobody's notification was taken."""
        from mooncake_hpc import TransferEngine
        from mooncake_hpc.core.errors import MooncakeError

        assert self.node is not None
        if told := self.node.call("notifications"):
            raise Finding(f"a stranger's notification was taken: {told}")
        try:
            if self._engine is None:
                settings = settings_of(self.node.hello["secret"])
                self._engine = TransferEngine(
                    "fuzz:1", "P2PHANDSHAKE", protocol="tcp", bind_address="127.0.0.1", settings=settings
                )
                self._local = self._engine.allocate(4 * PAGE)
            segment = self._engine.open_segment(self.node.hello["name"])
            for begin, end, _ in OPEN:
                self._engine.read(self._local[: end - begin], segment, BASE + begin, timeout=20)
                if not np.array_equal(self._local[: end - begin], self._memory[begin:end]):
                    raise Finding("who knows the secret read wrong bytes")
        except MooncakeError as error:
            raise Finding(f"who knows the secret is not served: {type(error).__name__}: {error}") from error
        self.check_memory()
        self.node.call("settle")
