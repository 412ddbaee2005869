"""Hosts that lose their power or their network, and so say nothing: what they held of a data port is given back.

Two network namespaces with a cable between them, which is pulled. Root only.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from conftest import clean_env

from mooncake_hpc.transports.tcp.options import IDLE_S, INTERVAL_S, PROBES, VANISHED_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
CLIENTS = 1024  # as many as a data port serves
FOUND = 3  # seconds, instead of VANISHED_S

TARGET = f"""
import json, sys
from mooncake_hpc import TransferEngine
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.tcp import options
options.IDLE_S, options.INTERVAL_S, options.PROBES, options.VANISHED_S = 1, 1, 2, {FOUND}
settings = Settings(tcp_progress_timeout={FOUND})
with TransferEngine("t:1", "P2PHANDSHAKE", protocol="tcp", bind_address="10.78.0.1", settings=settings) as engine:
    memory = engine.allocate(4096)
    server = engine._transports[0].server
    print(json.dumps([engine.name, server.port, memory.ctypes.data]), flush=True)
    for line in sys.stdin:  # how many connections are served
        print(json.dumps(sum(thread.fd >= 0 for thread in list(server._threads))), flush=True)
"""
CLIENT = """
import json, socket, struct, sys
port, address, count = map(int, sys.argv[1:])
clients = []
for _ in range(count):
    client = socket.create_connection(("10.78.0.1", port), timeout=20)
    client.sendall(struct.pack("<QQB7x", 64, address, 0x80))
    got = b""
    while len(got) < 72:
        got += client.recv(72 - len(got))
    clients.append(client)
print("connected", flush=True)
for line in sys.stdin:  # one more request over the first
    clients[0].sendall(struct.pack("<QQB7x", 64, address, 0x80))
    print(len(clients[0].recv(8)), flush=True)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Program:
    """A program of ours in a namespace, spoken to line by line."""

    def __init__(self, space: str, source: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", space, sys.executable, "-P", "-c", source, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_env(),
        )  # fmt: skip

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.line()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def spaces() -> Iterator[tuple[str, str, str]]:
    """Namespaces of a target (10.78.0.1), of clients beyond a cable that a test may pull, and of others."""
    names = tuple(f"mooncake-{role}-{os.getpid()}" for role in ("target", "far", "near"))
    target, far, near = names
    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", target, "link", "add", "br0", "type", "bridge")
        ip("-n", target, "addr", "add", "10.78.0.1/24", "dev", "br0")
        ip("-n", target, "link", "set", "br0", "up")
        for number, name in enumerate((far, near), 2):
            port = f"v{number}"
            ip("-n", target, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", target, "link", "set", port, "master", "br0", "up")
            ip("-n", name, "addr", "add", f"10.78.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield target, far, near


def test_clients_that_vanished_give_a_data_port_back(spaces: tuple[str, str, str]) -> None:
    """As many as it serves; one that is idle and there, on another host, keeps its connection."""
    target, far, near = spaces
    with Program(target, TARGET) as server:
        _, port, address = json.loads(server.line())
        with Program(near, CLIENT, port, address, 1) as living:
            assert living.line() == "connected\n"
            with Program(far, CLIENT, port, address, CLIENTS - 1) as vanishing:
                assert vanishing.line() == "connected\n"
                assert json.loads(server.ask()) == CLIENTS
                ip("-n", target, "link", "set", "v2", "down")
                pulled = time.monotonic()
                while json.loads(server.ask()) > 1:
                    assert time.monotonic() - pulled < FOUND + 5
                    time.sleep(0.1)
                assert time.monotonic() - pulled > 1
                assert living.ask() == "8\n"
                with Program(near, CLIENT, port, address, 5) as new:
                    assert new.line() == "connected\n"


def test_how_long_it_takes_for_real() -> None:
    """The figure that the documentation states."""
    assert IDLE_S + PROBES * INTERVAL_S == VANISHED_S == 30
