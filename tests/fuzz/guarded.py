"""Both ports of an engine with a secret, for clients that do not know it: hellos, proofs, requests, whole and spoilt.

A case's connections say with their first message which port they are for. Nothing but challenges and refusals may come
back, and registered memory stays as it is.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import rpc_port, values
from fuzz.node import Commands
from fuzz.target import Case, Finding, Node, Target

DATA, RPC = b"data", b"rpc"
SECRET = "a secret that fuzzers do not know"
SIZE, FILL = 1 << 16, 0xA5
HEADER = struct.Struct("<QQQ")
OK, HELLO = 0x4D43545600000000, 0xA0
REFUSED, CHALLENGE = struct.pack("<Q", OK | 2), struct.pack("<Q", OK | 3)


def secret_settings(folder: str) -> Any:
    """Settings with the secret, whose file is put into `folder`."""
    from mooncake_hpc.core.settings import Settings

    file = Path(folder, "secret")
    file.touch(0o600)
    file.write_text(SECRET)
    return Settings(secret_file=str(file))


@contextlib.contextmanager
def serve_guarded() -> Iterator[tuple[Any, Commands]]:
    """The target."""
    from mooncake_hpc import TransferEngine

    with tempfile.TemporaryDirectory() as folder:
        settings = secret_settings(folder)
        with TransferEngine(
            "target:1", "P2PHANDSHAKE", protocol="tcp", bind_address="127.0.0.1", settings=settings
        ) as engine:
            memory = engine.allocate(SIZE)
            memory[:] = FILL
            (transport,) = engine._transports
            hello = {"name": engine.name, "port": transport.server.port, "address": int(memory.ctypes.data)}
            yield hello, {"unchanged": lambda: bool((memory == FILL).all())}


class Guarded(Target):
    name = "guarded"

    def __init__(self) -> None:
        super().__init__()
        self._engine: Any = None
        self._folder = tempfile.TemporaryDirectory()

    def launch(self) -> Node:
        node = Node("guarded")
        host, _, port = node.hello["name"].rpartition(":")
        self._ports = {DATA: (host, node.hello["port"]), RPC: (host, int(port))}
        self._address = node.hello["address"]
        return node

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        super().stop()

    # --- input ----------------------------------------------------------------------------------------------

    def generate(self, chance: Random) -> Case:
        """Several connections."""
        case = []
        for _ in range(chance.choice((1, 1, 4, 16))):
            port = chance.choice((DATA, RPC))
            stream = self._data(chance) if port == DATA else self._rpc(chance)
            if chance.random() < 0.4:
                stream = values.mutate_bytes(chance, stream)
            if chance.random() < 0.1:
                stream = stream[: chance.randrange(len(stream) + 1)]
            case.append([port, *values.cut(chance, stream)])
        self.frames += len(case)
        return case

    def _data(self, chance: Random) -> bytes:
        opcode = chance.choice((0, 1, 0x80, 0x81))
        size = chance.choice((1, 8, 4096))
        request = HEADER.pack(size, self._address, opcode) + chance.randbytes(size) * (opcode & 1)
        nonce = [chance.choice((0, chance.getrandbits(64))) for _ in range(4)]
        hello = b"".join(HEADER.pack(0, word, HELLO) for word in nonce)
        proof = chance.choice((bytes(32), struct.pack("<4Q", *nonce), chance.randbytes(32)))
        return chance.choice((request, hello, hello + request, hello + proof + request, hello * 2, proof + hello))

    def _rpc(self, chance: Random) -> bytes:
        kind, value = rpc_port.requests(chance)
        plain = rpc_port.frame(chance, kind, values.mutate_json(chance, value))
        nonce = chance.randbytes(32).hex().encode()
        hello = _frame(b"H" + nonce)
        request = _frame(b"Q" + chance.choice((bytes(32), chance.randbytes(32))) + plain[8:])
        other = _frame(bytes([chance.randrange(256)]) + chance.randbytes(chance.choice((0, 1, 32, 96))))
        return chance.choice((plain, hello, request, other, hello + request, hello + other, hello + plain, hello * 2))

    # --- what comes of it -----------------------------------------------------------------------------------

    def run(self, case: Case) -> None:
        for port, *messages in case:
            reply = self._exchange(self._ports[port], messages)
            right = _is_data_reply(reply) if port == DATA else _is_rpc_reply(reply)
            if not right or bytes([FILL]) * 8 in reply:
                raise Finding(f"a stranger at the {port.decode()} port is answered {reply[:300]!r}")

    def _exchange(self, address: tuple[str, int], messages: list[bytes]) -> bytes:
        assert self.node is not None
        reply = b""
        try:
            with socket.create_connection(address, 20) as client:
                with contextlib.suppress(OSError):  # refused before the end
                    for message in messages:
                        client.sendall(message)
                    client.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    while part := client.recv(1 << 16):
                        reply += part
        except OSError as error:
            self.node.check_alive()
            raise Finding(f"no connection, or no end of it: {error!r}; so far {reply[:200]!r}") from error
        return reply

    def serve_check(self) -> None:
        """Who knows the secret is served meanwhile, and nothing was written."""
        from mooncake_hpc import TransferEngine
        from mooncake_hpc.core.errors import MooncakeError

        assert self.node is not None
        try:
            if self._engine is None:
                settings = secret_settings(self._folder.name)
                self._engine = TransferEngine(
                    "fuzz:1", "P2PHANDSHAKE", protocol="tcp", bind_address="127.0.0.1", settings=settings
                )
                self._local = self._engine.allocate(SIZE)
            self._local[:] = 0
            segment = self._engine.open_segment(self.node.hello["name"])
            self._engine.read(self._local, segment, self._address, timeout=20)
        except MooncakeError as error:
            raise Finding(f"a peer with the secret is not served: {type(error).__name__}: {error}") from error
        if not np.all(self._local == FILL) or not self.node.call("unchanged"):
            raise Finding("registered memory has changed")


def _frame(body: bytes) -> bytes:
    return rpc_port.LENGTH.pack(1 + len(body)) + bytes([rpc_port.AUTHENTICATION]) + body


def _is_data_reply(reply: bytes) -> bool:
    if reply.startswith(CHALLENGE):
        reply = reply[8 + 96 :] if len(reply) >= 8 + 96 else b"short"
    return reply in (b"", REFUSED)


def _is_rpc_reply(reply: bytes) -> bool:
    """At most a challenge and a refusal."""
    allowed = {ord("C"): 98, ord("X"): 3}
    while reply:
        (length,) = rpc_port.LENGTH.unpack(reply[:8].ljust(8, b"\0"))
        body, reply = reply[8 : 8 + length], reply[8 + length :]
        if len(body) < 2 or body[0] != rpc_port.AUTHENTICATION or allowed.pop(body[1], 0) != len(body):
            return False
    return True
