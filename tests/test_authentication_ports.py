"""Where a secret is set nobody comes in without it, at any port: strangers, replays, reflections, garbage, delays."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from test_tcp_server import DATA, ask, dial, until

from mooncake_hpc.control import client, proofs
from mooncake_hpc.control.server import ControlServer, Handlers, open_rpc_listener
from mooncake_hpc.core.authentication import Authentication, Expected, Purpose, Reason, Secret, parse_networks
from mooncake_hpc.core.errors import AuthenticationError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.base import Registration
from mooncake_hpc.transports.shm import handoff
from mooncake_hpc.transports.shm.client import dial as dial_shm
from mooncake_hpc.transports.shm.server import ShmServer
from mooncake_hpc.transports.tcp import proofs as data
from mooncake_hpc.transports.tcp.pipeline_kernels import OK, UNPROVED
from mooncake_hpc.transports.tcp.server import TcpServer
from mooncake_hpc.wire import rpc_frames as frames

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

KEY, OTHER = Secret(b"the secret of these tests"), Secret(b"the secret of other tests")
SETTINGS = Settings()
REFUSED = struct.pack("<Q", OK | UNPROVED)


def process(secret: Secret | None = KEY, allowed: str = "") -> Authentication:
    authentication = Authentication(secret, parse_networks(allowed))
    authentication.name, authentication.generation = "served:1", "g1"
    return authentication


def expecting(secret: Secret | None = KEY) -> Expected:
    return Authentication(secret).expect("served:1", "g1")


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


# --- data port --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def data_port(authentication: Authentication) -> Iterator[TcpServer]:
    server = TcpServer(socket.create_server(("127.0.0.1", 0), backlog=100), 30.0, authentication)
    server.export([Registration(int(DATA.ctypes.data), DATA.size, "cpu:0", True, True, DATA)], shrinks=False)
    try:
        yield server
    finally:
        server.close()


def prove(connection: socket.socket, expected: Expected) -> None:
    data.prove(connection, expected, "here", time.monotonic() + 5)
    connection.settimeout(20)


def request(opcode: int) -> bytes:
    return struct.pack("<QQQ", 8, int(DATA.ctypes.data), opcode)


@pytest.fixture
def guarded() -> Iterator[TcpServer]:
    with data_port(process()) as server:
        yield server


def test_a_proved_client_is_served_and_its_connection_has_an_id(guarded: TcpServer) -> None:
    with dial(guarded) as proved:
        prove(proved, expecting())
        assert ask(proved, 1000, identity=5) and ask(proved, DATA.size)
        assert guarded.fence(f"{5:014x}", 5) and proved.recv(1) == b""


@pytest.mark.parametrize(
    ("opening", "answer"),
    [
        (request(0x80), REFUSED),
        (request(0x81) + bytes(8), REFUSED),
        (request(0), b""),
        (request(1) + bytes(8), b""),
        (struct.pack("<QQQ", 0, 1, data.OPCODE) + request(0x80) * 3, REFUSED),
        (struct.pack("<QQQ", 0, 1, data.OPCODE | 1 << 8) + bytes(72), REFUSED),
        (b"GET / HTTP/1.1\r\nHost: some host\r\n\r\n", b""),
        (bytes(96), b""),
    ],
)
def test_strangers_are_refused_before_any_address_is_looked_at(
    guarded: TcpServer, opening: bytes, answer: bytes
) -> None:
    before = DATA[:8].tobytes()
    with dial(guarded) as stranger:
        stranger.sendall(opening)
        assert received(stranger) == answer
    assert guarded.moved == (0, 0) and DATA[:8].tobytes() == before


def hello(connection: socket.socket) -> bytes:
    """Send one, with a nonce that is none; the challenge."""
    connection.sendall(struct.pack("<QQQ", 0, 7, data.OPCODE) * 4)
    return frames.receive_exactly(connection, 8 + 96, time.monotonic() + 5)[8:]


def test_a_wrong_proof_is_refused_and_so_is_one_that_was_heard(guarded: TcpServer) -> None:
    with dial(guarded) as first, dial(guarded) as second:
        nonce, challenge = struct.pack("<Q", 7) * 4, hello(first)
        heard = expecting().open(Purpose.DATA, "")
        heard.nonce = nonce
        proof = heard.prove(challenge)
        first.sendall(proof)
        assert ask(first, 100)
        hello(second)
        second.sendall(proof + request(0))  # of an earlier connection with the same nonce
        assert received(second) == REFUSED
    for part in range(3):
        with dial(guarded) as reflecting:
            challenge = hello(reflecting)
            reflecting.sendall(challenge[32 * part : 32 * part + 32] + request(0))
            assert received(reflecting) == REFUSED


def test_slow_clients_are_cut_and_keep_nobody_waiting(guarded: TcpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "TIMEOUT", 1.0)
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(dial(guarded)) for _ in range(20)]

        def drip() -> None:
            for byte in struct.pack("<QQQ", 0, 7, data.OPCODE) * 4:
                for connection in slow[:10]:
                    with contextlib.suppress(OSError):
                        connection.sendall(bytes([byte]))
                if stop.wait(0.1):
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            began = time.monotonic()
            with dial(guarded) as quick:
                prove(quick, expecting())
                assert ask(quick, 100)
            assert time.monotonic() - began < 0.9  # less than the others may take
            assert all(received(connection) == b"" for connection in slow)
            assert time.monotonic() - began < 5
        finally:
            stop.set()
            dripping.join()
    until(lambda: all(thread.fd < 0 for thread in list(guarded._threads)))


def test_the_port_closes_while_clients_are_silent() -> None:
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        with data_port(process(allowed="127.0.0.1")) as server:
            silent = [stack.enter_context(dial(server)) for _ in range(3)]
            until(lambda: sum(thread.fd >= 0 for thread in list(server._threads)) == 3)
        assert time.monotonic() - began < 4 and all(received(connection) == b"" for connection in silent)


def test_an_allowed_address_needs_no_proof_and_may_give_one() -> None:
    with data_port(process(allowed="127.0.0.0/8")) as server, dial(server) as plain, dial(server) as proved:
        assert ask(plain, 1000)
        prove(proved, expecting())
        assert ask(proved, 1000)
        with dial(server) as whole:
            whole.sendall(request(0x80) * 5)
            assert frames.receive_exactly(whole, 5 * 16, time.monotonic() + 5)[8:16] == DATA[:8].tobytes()


def impostor(answer: Callable[[bytes], bytes]) -> tuple[int, threading.Thread]:
    """A port where one client's hello is answered with that, and then the connection ends."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.settimeout(5)
            with contextlib.suppress(frames.Closed, ConnectionError):
                connection.sendall(answer(frames.receive_exactly(connection, 96, time.monotonic() + 5)))
                connection.shutdown(socket.SHUT_WR)
                received(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    return listener.getsockname()[1], thread


ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "Mooncake's refusal": lambda hello: struct.pack("<Q", OK | 1),
    "its hello": lambda hello: hello,
    "its nonce": lambda hello: struct.pack("<Q", data.CHALLENGE) + hello[8:16] * 12,
    "zeros": lambda hello: struct.pack("<Q", data.CHALLENGE) + bytes(96),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_client_proves_nothing_to_who_has_not(kind: str) -> None:
    port, thread = impostor(ANSWERS[kind])
    expected = pytest.raises(AuthenticationError, match=r"segment 'served:1' at here")
    with socket.create_connection(("127.0.0.1", port), 5) as connection, expected:
        prove(connection, expecting())
    thread.join()


def test_a_connection_that_ends_before_the_challenge_is_no_refusal() -> None:
    port, thread = impostor(lambda _hello: b"")
    with socket.create_connection(("127.0.0.1", port), 5) as connection, pytest.raises(frames.Closed):
        prove(connection, expecting())
    thread.join()


# --- RPC port ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def rpc_port(authentication: Authentication) -> Iterator[str]:
    handlers = Handlers(generation="g1", metadata=lambda: '{"secret":1}\n', notify=lambda _name, _text: True)
    server = ControlServer(open_rpc_listener("x", "127.0.0.1", SETTINGS), handlers, SETTINGS, authentication)
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        server.stop()


PAIRS = [
    (KEY, KEY, None),
    (None, None, None),
    (KEY, OTHER, Reason.SECRETS_DIFFER),
    (KEY, None, Reason.NO_SECRET_HERE),
    (None, KEY, Reason.NO_SECRET_THERE),
]


@pytest.mark.parametrize(("theirs", "ours", "reason"), PAIRS)
def test_every_kind_of_exchange_at_the_rpc_port(
    theirs: Secret | None, ours: Secret | None, reason: Reason | None
) -> None:
    with rpc_port(process(theirs)) as address:
        calls: list[Callable[[], object]] = [
            lambda: client.probe(address, 5, SETTINGS, expected=expecting(ours)),
            lambda: client.probe(address, 5, SETTINGS, "fence", 1.0, expected=expecting(ours)),
            lambda: client.notify(address, "me", "text", 5, SETTINGS, expecting(ours)),
            lambda: client.exchange(address, frames.Kind.METADATA, {}, 5, SETTINGS, expecting(ours)),
            lambda: client.exchange(address, frames.Kind.CONNECTION, {}, 5, SETTINGS, expecting(ours)),
        ]
        for call in calls:
            if reason is None:
                call()
                continue
            with pytest.raises(AuthenticationError, match="segment 'served:1' at 127") as failure:
                call()
            assert failure.value.reason == reason


def talk(address: str, *parts: bytes) -> list[bytes]:
    """The bodies of the frames that come in answer to each of these."""
    host, _, port = address.rpartition(":")
    answers = []
    with socket.create_connection((host, int(port)), 5) as connection:
        for part in parts:
            connection.sendall(part)
            try:
                answers.append(frames.receive_body(connection, 1 << 20, time.monotonic() + 5))
            except (frames.Closed, ConnectionResetError):
                break
    return answers


def refused(why: proofs.Refusal) -> bytes:
    return bytes([proofs.AUTHENTICATION, proofs.Step.REFUSED, why])


HELLO = proofs.encode(proofs.Step.HELLO, b"07" * 32)


@pytest.mark.parametrize(
    "opening",
    [
        frames.encode(frames.Kind.METADATA, "{}"),
        frames.encode(frames.Kind.PROBE, "{}"),
        frames.encode(frames.Kind.CONNECTION, "{}", old=True),
        frames.encode(frames.Kind.NOTIFY, "x" * 1_000_000),
        proofs.encode(proofs.Step.HELLO, b"07" * 31),
        proofs.encode(proofs.Step.HELLO, b"0x" * 32),
        proofs.encode(proofs.Step.HELLO, b"07 " * 21 + b"0"),
        proofs.encode(proofs.Step.HELLO, "é".encode() * 32),
        proofs.encode(proofs.Step.REQUEST, bytes(32)),
        proofs.encode(proofs.Step.REPLY, bytes(32)),
        frames.pack(bytes([proofs.AUTHENTICATION])),
        frames.pack(b"\x80{}"),
    ],
)
def test_the_rpc_port_answers_nothing_to_strangers(opening: bytes) -> None:
    with rpc_port(process()) as address:
        assert talk(address, opening) == [refused(proofs.Refusal.UNPROVED)]


def test_an_rpc_request_is_proved_with_its_text_and_once() -> None:
    probe = frames.encode_body(frames.Kind.PROBE, "{}")
    with rpc_port(process()) as address:
        exchange = expecting().open(Purpose.CONTROL, "")
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), 5) as connection:
            connection.sendall(proofs.encode(proofs.Step.HELLO, exchange.nonce.hex().encode()))
            challenge = frames.receive_body(connection, 1 << 20, time.monotonic() + 5)[2:]
            proved = proofs.encode(proofs.Step.REQUEST, exchange.prove(challenge, probe), probe)
            changed = proved.replace(b"{}", b"[]")
            connection.sendall(changed)
            answer = frames.receive_body(connection, 1 << 20, time.monotonic() + 5)
        assert answer == refused(proofs.Refusal.WRONG)
        again = talk(address, proofs.encode(proofs.Step.HELLO, exchange.nonce.hex().encode()), proved)
        assert again[1] == refused(proofs.Refusal.WRONG)
        reflected = talk(address, HELLO, proofs.encode(proofs.Step.REQUEST, again[0][2:34], probe))
        assert reflected[1] == refused(proofs.Refusal.WRONG)


def test_an_rpc_port_of_another_process_than_the_published_one() -> None:
    with rpc_port(process()) as address, pytest.raises(AuthenticationError) as failure:
        client.probe(address, 5, SETTINGS, expected=Authentication(KEY).expect("served:1", "g0"))
    assert failure.value.reason == Reason.ANOTHER_PROCESS


def test_allowed_addresses_go_without_proof_in_both_roles() -> None:
    with rpc_port(process(allowed="127.0.0.1")) as address:
        assert client.probe(address, 5, SETTINGS).generation == "g1"
        assert client.probe(address, 5, SETTINGS, expected=expecting()).generation == "g1"
        with pytest.raises(AuthenticationError):  # who sends a hello is held to it
            client.probe(address, 5, SETTINGS, expected=expecting(OTHER))
    with rpc_port(process(None)) as address:
        lenient = Authentication(KEY, parse_networks("127.0.0.1")).expect("served:1", "g1")
        assert client.probe(address, 5, SETTINGS, expected=lenient).generation == "g1"


# --- shared memory ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shm_server(secret: Secret | None) -> Iterator[socket.socket]:
    """A connection to one."""
    server = ShmServer(process(secret))
    connection = dial_shm(server.address)
    assert connection is not None
    with connection:
        yield connection
    server.close()


@pytest.mark.parametrize(("theirs", "ours", "reason"), PAIRS)
def test_no_memory_is_handed_over_without_proof(
    theirs: Secret | None, ours: Secret | None, reason: Reason | None
) -> None:
    with shm_server(theirs) as connection:
        context = pytest.raises(AuthenticationError) if reason else contextlib.nullcontext()
        with context as failure:
            handoff.prove(connection, expecting(ours))
            handoff.send(connection, {"have": []}, [])
            reply = handoff.receive(connection, handoff.read_reply)
            assert reply is not None
            handoff.check_admitted(reply, expecting(ours))
            assert reply.page
            socket.close(handoff.receive_fd(connection))
        if failure is not None:
            assert failure.value.reason == reason


@pytest.mark.parametrize("opening", [{"have": []}, {"hello": "00"}, {"hello": 7}, [], None, "x" * 2000])
def test_garbage_before_the_proof_at_the_shared_memory_socket(opening: object) -> None:
    with shm_server(KEY) as connection:
        handoff.send(connection, opening, [])
        answers = []
        with contextlib.suppress(OSError):
            while (answer := handoff.receive(connection, handoff.read_reply)) is not None:
                answers.append(answer)
                handoff.send(connection, {"proof": "00" * 32}, [])
        assert not any(answer.page or answer.version for answer in answers)
