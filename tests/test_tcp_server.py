"""The data port's threads: they are used again, are few, and as many as are needed; nobody is turned away for good."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from test_tcp_options import send_buffer

from mooncake_hpc.testing.peer import pattern
from mooncake_hpc.transports.base import Registration
from mooncake_hpc.transports.tcp import accept_kernels as tcp_accept
from mooncake_hpc.transports.tcp import server as module
from mooncake_hpc.transports.tcp.options import set_options
from mooncake_hpc.transports.tcp.server import TcpServer

READ_V1, READ_V2 = 0, 0x80
REFUSAL = 0x4D43545600000001
DATA = pattern(9, 100_000)

pytestmark = pytest.mark.usefixtures("no_leaks")


@contextlib.contextmanager
def serving(host: str = "127.0.0.1") -> Iterator[TcpServer]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = TcpServer(socket.create_server((host, 0), family=family, backlog=2000), patience=30.0)
    address = int(DATA.ctypes.data)
    server.export([Registration(address, DATA.size, "cpu:0", True, True, DATA)], shrinks=False)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server() -> Iterator[TcpServer]:
    with serving() as server:
        yield server


def dial(server: TcpServer, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, server.port), 20)


def ask(client: socket.socket, nbytes: int, identity: int = 0) -> bool:
    """Whether the first `nbytes` of DATA come; False where the connection ends before."""
    client.sendall(struct.pack("<QQQ", nbytes, int(DATA.ctypes.data), READ_V1 | identity << 8))
    got = b""
    while len(got) < nbytes:
        part = client.recv(1 << 18)
        if not part:
            return False
        got += part
    return got == DATA[:nbytes].tobytes()


def threads() -> int:
    return sum(thread.name == "mooncake-tcp" for thread in threading.enumerate())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_its_connections_have_the_options_of_the_other_side(host: str) -> None:
    with serving(host) as server, dial(server, host) as client:
        assert ask(client, 10)
        set_options(client)
        (fd,) = [thread.fd for thread in list(server._threads) if thread.fd >= 0]
        with socket.socket(fileno=os.dup(fd)) as theirs:
            assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) and not os.get_blocking(fd)
            assert send_buffer(theirs) == send_buffer(client) and not os.get_inheritable(fd)


@pytest.mark.parametrize("opcode", [0, 1, 0x80, 0x81, 0x7E, 0xFF])
def test_an_address_anywhere_else_is_refused(server: TcpServer, opcode: int) -> None:
    """Neither a large address nor a large size, nor their sum, is taken for one below zero."""
    start, end = int(DATA.ctypes.data), int(DATA.ctypes.data) + DATA.size
    places = [
        (start + (1 << 63), 8),
        ((1 << 64) - 4096, 8),
        ((1 << 64) - 8, 16),
        (start, 1 << 63),
        (start, (1 << 64) - 8),
    ]
    places += [(start - 1, 8), (end - 7, 8), (start, DATA.size + 1), (0, 8), (start, 0), (start, (1 << 63) - 1)]
    before = DATA.copy()
    for address, size in places:
        with dial(server) as client:
            client.sendall(struct.pack("<QQQ", size, address, opcode) + bytes(64))
            client.shutdown(socket.SHUT_WR)
            reply = b"".join(iter(lambda client=client: client.recv(4096), b""))
        assert reply == (struct.pack("<Q", REFUSAL) if opcode & 0x80 else b"")
    assert (before == DATA).all()
    with dial(server) as client:
        assert ask(client, DATA.size)


@pytest.mark.parametrize("first", [0, 1], ids=["nameless", "named"])
def test_one_connection_after_the_other_takes_few_threads(server: TcpServer, first: int) -> None:
    for number in range(300):
        with dial(server) as client:
            assert ask(client, 1000, first * (1 + number))
    assert threads() <= tcp_accept.SPARE + 1
    assert server.moved == (0, 300_000)


@pytest.mark.parametrize("first", [0, 1], ids=["nameless", "named"])
def test_threads_of_many_connections_end_with_them(server: TcpServer, first: int) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(server)) for _ in range(200)]
        assert all(ask(client, 100, first * number) for number, client in enumerate(clients, 1))
        until(lambda: threads() > 200)  # and one that waits for the next
    until(lambda: threads() <= tcp_accept.SPARE + 1)
    assert server.moved == (0, 20_000)
    with dial(server) as client:
        assert ask(client, 1000)


def test_where_there_is_no_room_silent_clients_give_way_and_others_wait(
    server: TcpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 3)
    with dial(server) as silent, dial(server) as second, dial(server) as third, dial(server) as fourth:
        assert ask(second, 10) and ask(third, 10)
        assert ask(fourth, 10) and silent.recv(1) == b""
        with dial(server) as fifth:
            fifth.settimeout(1.0)
            with pytest.raises(TimeoutError):
                ask(fifth, 10)
            assert ask(second, 10)
            third.close()
            fifth.settimeout(20)
            assert fifth.recv(100) == DATA[:10].tobytes()


def test_connections_without_a_descriptor_wait_for_one(server: TcpServer, caplog: pytest.LogCaptureFixture) -> None:
    with dial(server) as first, dial(server) as silent:
        assert ask(first, 10)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.socket()) for _ in range(10)]
            resource.setrlimit(resource.RLIMIT_NOFILE, (clients[-1].fileno() + 3, limits[1]))
            try:
                for client in clients:
                    client.connect(("127.0.0.1", server.port))
                until(lambda: "accept: Too many open files" in caplog.text)
                time.sleep(2 * module.SILENT)
                assert ask(first, 10) and threads() < 10
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for client in [*clients, silent]:
                client.settimeout(20)
                assert ask(client, 10)
    assert caplog.text.count("Too many open files") <= 2


def test_the_default_timeout_of_sockets_has_no_effect() -> None:
    socket.setdefaulttimeout(30)
    try:
        with serving() as server, dial(server) as client:
            time.sleep(0.2)
            assert ask(client, 10) and threads() == 2
    finally:
        socket.setdefaulttimeout(None)


def test_what_nobody_has_accepted_holds_up_no_end() -> None:
    with serving() as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(server)) for _ in range(500)]
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 4 and threads() == 0
        for client in clients:
            client.settimeout(5)
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""


def test_a_fence_ends_the_connection_of_that_id_alone(server: TcpServer) -> None:
    """And one that shows up later."""
    with dial(server) as one, dial(server) as other:
        for client, identity in ((one, 1), (other, 2)):
            request = struct.pack("<QQQ", 5, int(DATA.ctypes.data), READ_V2 | identity << 8)
            client.sendall(request)
            client.settimeout(20)
            assert client.recv(13, socket.MSG_WAITALL)[8:] == DATA[:5].tobytes()
        assert server.fence(f"{1:014x}", 5) and one.recv(1) == b""
        assert ask(other, 10)
        assert server.fence(f"{3:014x}", 5)
        with dial(server) as late:
            late.sendall(struct.pack("<QQQ", 5, int(DATA.ctypes.data), READ_V2 | 3 << 8))
            late.settimeout(20)
            with contextlib.suppress(ConnectionError):
                assert late.recv(1) == b""


def test_fences_are_of_one_form_bounded_and_forgotten(server: TcpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is no id is not kept; an id is, until its connection cannot show up any more."""
    for text in ("", "x", "0" * 13, "0" * 15, "A" * 14, "0123456789abc\n", "x" * 1_000_000, "²" * 14):
        assert server.fence(text, 0.0)
    assert not server._fenced
    monkeypatch.setattr(module, "MAX_FENCED", 100)
    for number in range(1, 151):
        assert server.fence(f"{number:014x}", 0.0)
    assert list(server._fenced) == [f"{number:014x}" for number in range(51, 151)]
    with dial(server) as fenced, dial(server) as other:
        assert not ask(fenced, 10, 150)
        assert ask(other, 10, 1)  # forgotten, as so many came later
    monkeypatch.setattr(module, "FENCED_LIFE_S", 1e-9)
    assert server.fence(f"{200:014x}", 0.0)
    assert list(server._fenced) == [f"{200:014x}"]
