"""The options of data connections, as the kernel tells them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mooncake_hpc.transports.tcp.options import LOCAL_SEND_BUFFER, set_options


@contextlib.contextmanager
def connected(ours: str, theirs: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    family = socket.AF_INET6 if ":" in theirs else socket.AF_INET
    with socket.create_server((theirs, 0), family=family) as listener, socket.socket(family) as client:
        client.bind((ours, 0))
        client.connect(listener.getsockname()[:2])
        server, _ = listener.accept()
        with server:
            yield client, server


def send_buffer(connection: socket.socket) -> int:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.3", "::1"])
def test_the_queue_within_a_host_is_short(host: str) -> None:
    with connected(host, host) as ends:
        for end in ends:
            set_options(end)
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) and not end.getblocking()
            most = int(Path("/proc/sys/net/core/wmem_max").read_text())
            assert send_buffer(end) == 2 * min(LOCAL_SEND_BUFFER, most)  # man 7 socket: the kernel doubles it


def test_the_kernel_tunes_the_queue_to_another_address() -> None:
    with connected("127.0.0.4", "127.0.0.5") as ends:
        before = [send_buffer(end) for end in ends]
        for end in ends:
            set_options(end)
        assert [send_buffer(end) for end in ends] == before


def test_a_connection_that_was_reset_at_once_is_no_error() -> None:
    with connected("127.0.0.1", "127.0.0.1") as (client, server):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close() resets
        client.close()
        set_options(server)
