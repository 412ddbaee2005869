"""The RPC port: `u64 length`, a kind, JSON; and the old framing without a kind."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

from fuzz import values
from fuzz.node import Commands
from fuzz.target import Case, Finding, Node, Target

LENGTH = struct.Struct("<Q")
CONNECTION, METADATA, NOTIFY, PROBE = range(4)
AUTHENTICATION = 0xA0


@contextlib.contextmanager
def serve_rpc() -> Iterator[tuple[Any, Commands]]:
    """The target: an engine that answers for itself."""
    from mooncake_hpc import TransferEngine

    with TransferEngine("target:1", "P2PHANDSHAKE", protocol="tcp", bind_address="127.0.0.1") as engine:
        engine.allocate(1 << 16)
        yield (
            {"name": engine.name, "generation": engine.generation},
            {"notifications": lambda: len(engine.notifications())},
        )


def requests(chance: Random) -> tuple[int, Any]:
    """A kind, and JSON that is right for it."""
    kind = chance.randrange(4)
    if kind == CONNECTION:
        path = f"127.0.0.1:{chance.randrange(1 << 16)}@mlx5_0"
        value: Any = {
            "local_nic_path": path, "peer_nic_path": "target:1@mlx5_1", "qp_num": [1, 2], "local_lid": 0,
            "local_gid": "fe80:" * 7 + "0001", "reply_msg": "", "ready_ack": False, "payload": "",
            "mooncake_hpc": {"mtu": 4096},
        }  # fmt: skip
    elif kind == NOTIFY:
        value = {"name": "fuzz:1", "notify_msg": "x" * chance.choice((0, 1, 100, 10_000))}
    elif kind == PROBE:
        value = chance.choice(({}, {"fence": f"{chance.getrandbits(56):014x}", "timeout": 0.01}))
    else:
        value = {}
    return kind, value


def frame(chance: Random, kind: int, text: str) -> bytes:
    """The frame of a text, most often with the right length."""
    body = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.85:
        body = bytes([kind if chance.random() < 0.9 else chance.randrange(256)]) + body
    length = len(body) if chance.random() < 0.9 else values.border(chance)
    return LENGTH.pack(length) + body


class RpcPort(Target):
    name = "rpc"

    def launch(self) -> Node:
        node = Node("rpc")
        host, _, port = node.hello["name"].rpartition(":")
        self._address = (host, int(port))
        return node

    def generate(self, chance: Random) -> Case:
        """Several connections at once."""
        case = []
        for _ in range(chance.choice((1, 4, 16))):
            kind, value = requests(chance)
            text = values.mutate_json(chance, value) if chance.random() < 0.8 else json.dumps(value)
            data = frame(chance, kind, text)
            if chance.random() < 0.1:
                data = values.mutate_bytes(chance, data)
            if chance.random() < 0.1:
                data += frame(chance, *requests(chance)[:1], "{}")
            case.append(values.cut(chance, data))
        self.frames += len(case)
        return case

    def run(self, case: Case) -> None:
        with contextlib.ExitStack() as stack:
            clients = []
            for messages in case:
                client = stack.enter_context(self._dial())
                with contextlib.suppress(OSError):  # cut in the middle of what it did not want
                    for message in messages:
                        client.sendall(message)
                    client.shutdown(socket.SHUT_WR)
                clients.append(client)
            for client in clients:
                self._check_reply(self._all(client))

    def _dial(self) -> socket.socket:
        assert self.node is not None
        try:
            client = socket.create_connection(self._address, 20)
        except OSError as error:
            with contextlib.suppress(Exception):
                self.node.process.wait(0.5)
            self.node.check_alive()
            raise Finding(f"the port takes no connections: {error!r}") from error
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def _all(self, client: socket.socket) -> bytes:
        parts = []
        try:
            while part := client.recv(1 << 18):
                parts.append(part)
        except TimeoutError as error:
            raise Finding(f"a connection has no end within 20 s; so far {b''.join(parts)[:200]!r}") from error
        except ConnectionError:
            pass
        return b"".join(parts)

    def _check_reply(self, data: bytes) -> None:
        if not data:
            return
        try:
            (length,) = LENGTH.unpack(data[:8])
            body = data[8:]
            if length != len(body):
                raise ValueError(f"length {length} of {len(body)} bytes")
            if body[0] == AUTHENTICATION:  # "prove who you are first", to a frame that claims to be part of that
                return
            json.loads(body[1:] if body[0] <= PROBE else body)
        except (ValueError, struct.error, IndexError) as error:
            raise Finding(f"a malformed reply, {error}: {data[:200]!r}") from error

    def serve_check(self) -> None:
        """Probe and Metadata are answered as ever; notifications are taken, as the program that owns the node does."""
        assert self.node is not None
        for kind, key, expected in ((PROBE, "status", "success"), (METADATA, "name", self.node.hello["name"])):
            with self._dial() as client:
                client.sendall(LENGTH.pack(3) + bytes([kind]) + b"{}")
                client.shutdown(socket.SHUT_WR)
                data = self._all(client)
            if json.loads(data[9:] or b"{}").get(key) != expected:
                raise Finding(f"a right request of kind {kind} is answered {data[:200]!r}")
        self.node.call("notifications")
        self.node.call("settle")
