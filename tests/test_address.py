"""Address texts, the published address, listeners."""

import contextlib
import socket
import time
from typing import Any

import pytest

from mooncake_hpc.core import address
from mooncake_hpc.core.address import (
    bind_listener,
    is_local,
    join,
    published_address,
    resolve,
    source_address,
    split,
)
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.embedded import EmbeddedEtcd

NONAME = "no-such-host.invalid"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("node7", ("node7", 12001)),
        ("node7:65535", ("node7", 65535)),
        ("[::1]:12345", ("::1", 12345)),
        ("[fe80::1]", ("fe80::1", 12001)),
        ("::1", ("::1", 12001)),
        (" localhost:1 ", ("localhost", 1)),
    ],
)
def test_split(text: str, parts: tuple[str, int]) -> None:
    assert split(text, 12001) == parts
    assert split(join(*parts), 1) == parts


BAD = ["", ":1", "a:", "a:x", "a:0", "a:65536", "a:-1", "a:²", "a:" + "9" * 5000, "[::1", "[::1]80", "[]:1"]


@pytest.mark.parametrize("text", BAD)
def test_split_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        split(text, 12001)


@pytest.mark.parametrize(
    "name", ["a" * 64, "a" * 64 + ".b", "a..b", ".a", "b\udcff", "\ud800", "localhost\0.b", "é" * 300]
)
def test_what_can_be_no_host_name_fails_as_a_name(name: str) -> None:
    """Names that DNS cannot be asked for, each wherever a host is named."""
    with pytest.raises(socket.gaierror, match=r"host name|not known"):
        resolve(name, 80)
    with pytest.raises(OSError):
        address.dial(name, 80, time.monotonic() + 5)
    with pytest.raises(ConfigError, match="cannot listen"):
        bind_listener(name, [0])
    with pytest.raises(ConfigError, match="MC_TCP_BIND_ADDRESS"):
        published_address("a", "memory://a", Settings(tcp_bind_address=name))
    with pytest.raises(ConfigError, match="cannot listen"):
        EmbeddedEtcd(name)
    assert source_address(name) is None and not is_local(name)
    assert published_address(name, f"{name}:2379", Settings())


def test_is_local() -> None:
    assert is_local("127.0.0.1")
    for foreign in ("192.0.2.1", "0.0.0.0", "::", "224.0.0.1", "255.255.255.255", NONAME, ""):
        assert not is_local(foreign)


def test_published_address_rule() -> None:
    plain = Settings()
    bound = Settings(tcp_bind_address="127.0.0.3")
    assert published_address("127.0.0.2:1", "10.1.1.1:2379", bound) == "127.0.0.3"
    assert published_address("127.0.0.2:1", "10.1.1.1:2379", plain) == "127.0.0.2"
    assert published_address("localhost:1", "memory://x", plain) == "127.0.0.1"
    assert published_address(f"{NONAME}:1", "127.0.0.1:2379", plain) == "127.0.0.1"
    assert published_address("any text: even this", "etcd://127.0.0.1:1,127.0.0.1:2", plain) == "127.0.0.1"
    assert published_address("shard/7", "memory://x", plain) == "127.0.0.1"
    assert published_address("[::1]:1", "memory://x", plain) == ("::1" if is_local("::1") else "127.0.0.1")


def test_published_address_follows_the_route(caplog: pytest.LogCaptureFixture) -> None:
    default = source_address("192.0.2.1")
    expected = default or "127.0.0.1"
    assert published_address("192.0.2.77:12345", "192.0.2.1:2379", Settings()) == expected
    assert [r.getMessage() for r in caplog.records] == [
        f"name '192.0.2.77:12345' holds an address that is none of this machine's: peers are told {expected}"
    ]
    assert published_address("job-17", "P2PHANDSHAKE", Settings()) == expected
    assert is_local(expected)


def test_own_host_name_on_loopback_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def debian(host, port, *args, **kwargs):  # type: ignore[no-untyped-def]
        if host == "thisnode" and not kwargs.get("flags"):
            host = "127.0.1.1"
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", debian)
    expected = source_address("192.0.2.1") or "127.0.0.1"
    assert published_address("thisnode:12345", "192.0.2.1:2379", Settings()) == expected


def test_bad_bind_address_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="MC_TCP_BIND_ADDRESS"):
        published_address("x", "memory://x", Settings(tcp_bind_address=NONAME))
    with pytest.raises(ConfigError, match="MC_TCP_BIND_ADDRESS"):
        bind_listener("192.0.2.1", [0])


def test_listener_takes_the_next_free_port_and_says_when_none_is() -> None:
    with bind_listener("127.0.0.1", [0]) as first:
        taken = first.getsockname()[1]
        with bind_listener("127.0.0.1", [taken, 0]) as second:
            assert second.getsockname()[0] == "127.0.0.1"
            assert second.getsockname()[1] != taken
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{taken}.*choose another with --port"):
            bind_listener("127.0.0.1", [taken], hint="--port")


def test_bind_all_listens_everywhere() -> None:
    with bind_listener("127.0.0.1", [0], bind_all=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
        socket.create_connection(("127.0.0.9", listener.getsockname()[1]), 5).close()


@pytest.mark.skipif(not is_local("::1"), reason="this machine has no IPv6")
def test_ipv6_listener() -> None:
    with bind_listener("::1", [0]) as listener:
        socket.create_connection(("::1", listener.getsockname()[1]), 5).close()
    with bind_listener("::1", [0], bind_all=True) as listener:
        socket.create_connection(("127.0.0.1", listener.getsockname()[1]), 5).close()
    assert published_address("job", "[::1]:2379", Settings()) == "::1"


def test_name_service_without_answer_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    release = threading.Event()
    real = socket.getaddrinfo

    def silent(host, port, *args, **kwargs):  # type: ignore[no-untyped-def]
        if not kwargs.get("flags"):
            release.wait(10)
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    with pytest.raises(TimeoutError, match="no answer about the host name"):
        resolve("slow.example", 1, timeout=0.1)
    release.set()


def entry(address: tuple[str, int]) -> tuple[Any, ...]:
    return socket.AF_INET, socket.SOCK_STREAM, 0, "", address


@pytest.mark.slow
def test_a_silent_address_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        silent, answering = (stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0)) for _ in range(2))
        for _ in range(3):  # a full backlog: further connections hear nothing
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(silent.getsockname())
        names = [entry(silent.getsockname()), entry(answering.getsockname())]
        monkeypatch.setattr(address, "resolve", lambda *_, **__: names)
        with address.dial("two", 1, time.monotonic() + 1) as connection:
            assert connection.getpeername() == answering.getsockname()
        monkeypatch.setattr(address, "resolve", lambda *_, **__: names[:1])
        with pytest.raises(TimeoutError):
            address.dial("silent", 1, time.monotonic() + 0.2)
        monkeypatch.setattr(address, "resolve", lambda *_, **__: [])
        with pytest.raises(OSError, match="'none' has no address"):
            address.dial("none", 1, time.monotonic() + 1)
