"""Peers that are there and are not: every wait ends at its deadline, and what was never sent is given back at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from mooncake_hpc import READ, WRITE, TransferEngine
from mooncake_hpc.core.errors import (
    AddressRejected,
    NameInUse,
    PeerLost,
    PeerSilent,
    TransferCancelled,
    TransferTimeout,
)
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.testing.link import Link, linked, requests
from mooncake_hpc.testing.peer import Bytes, PeerProcess
from mooncake_hpc.transports.shm import handoff
from mooncake_hpc.transports.tcp import client as tcp

HOST = "127.0.0.1"
SLACK = 0.5  # seconds that a deadline may be missed by
SIZE = 24 << 20  # bytes: more than the socket buffers of both sides hold

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]


@contextlib.contextmanager
def lasting(least: float, most: float | None = None) -> Iterator[None]:
    """What is within takes so many seconds, or SLACK more than `least`."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert least <= took <= (least + SLACK if most is None else most), took


@pytest.fixture
def hole() -> Iterator[int]:
    """A port that drops packets: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((HOST, 0))
        listener.listen(0)
        for _ in range(3):
            plug = stack.enter_context(socket.socket())
            plug.setblocking(False)
            plug.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@contextlib.contextmanager
def reaching(endpoint: tuple[str, int], peer: PeerProcess, settings: Settings | None = None) -> Iterator[Link]:
    """Ours and the peer, whose data port is dialled at `endpoint`."""
    with TransferEngine("ours:1", "P2PHANDSHAKE", protocol="tcp", bind_address=HOST, settings=settings) as engine:
        engine._directory.data_endpoint = lambda _descriptor: endpoint  # type: ignore[method-assign]
        local, remote = engine.allocate(4096), peer.call("allocate", 4096)
        yield Link(engine, peer, engine.open_segment(peer.name), local, remote)


@pytest.fixture(scope="module")
def peer() -> Iterator[PeerProcess]:
    with PeerProcess("P2PHANDSHAKE", "tcp") as peer:
        yield peer


@pytest.mark.parametrize("opcode", [READ, WRITE])
def test_a_peer_that_drops_packets(peer: PeerProcess, hole: int, opcode: int) -> None:
    """Of connecting nothing is waited for but until the deadline."""
    with reaching((HOST, hole), peer) as link:
        for timeout in (0.6, 0.1):
            with lasting(timeout), pytest.raises(TransferTimeout, match=f"not done after {timeout:g} s"):
                link.run(link.request(opcode, 0, 0, 4096), timeout=timeout)
        batches = [link.engine.submit(requests(link.request(opcode, 0, 0, 4096))) for _ in range(3)]
        for batch in (batches[1], batches[0]):  # wherever it is in the queue
            with lasting(0):
                batch.cancel()
            with pytest.raises(TransferCancelled):
                batch.wait(0)
        assert not batches[2].done
        with lasting(0):
            link.engine.close()
        assert batches[2].done


def test_names_that_nobody_resolves(peer: PeerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """getaddrinfo has no deadline of its own."""
    answer, real = threading.Event(), socket.getaddrinfo

    def silent(host: str, *arguments: object, **options: object) -> object:
        if host == "nowhere.example" and not options.get("flags"):
            answer.wait(20)
        return real(host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    with reaching(("nowhere.example", 1), peer) as link:
        with lasting(0.3), pytest.raises(TransferTimeout):
            link.run(link.request(READ, 0, 0, 1), timeout=0.3)
        with lasting(0):
            link.engine.close()
        answer.set()


def test_a_queue_behind_bytes_that_a_stopped_peer_does_not_take() -> None:
    """Batches behind them are given back at once, and cost the connection nothing: it goes on with the others."""
    with linked("tcp", SIZE, settings=Settings(tcp_lanes_per_peer=1)) as link:
        link.local[:] = 1
        link.run(link.request(WRITE, 0, 0, SIZE))
        link.local[:] = 2
        link.peer.suspend()
        connections = link.engine.lane_bytes()
        first = link.engine.submit(requests(link.request(WRITE, 0, 0, SIZE - 8192)))
        second, third, fourth = (
            link.engine.submit(requests(*[link.request(opcode, at, at, 64) for at in range(SIZE - 8192, SIZE, 64)]))
            for opcode in (WRITE, READ, WRITE)
        )
        assert not first.join(0.2)
        for batch in (third, second):
            with lasting(0):
                batch.cancel()
            assert (batch.status == batch.status[0]).all() and isinstance(batch.error, TransferCancelled)
        assert not first.done and not fourth.done
        link.local[SIZE - 8192 :] = 4
        link.peer.resume()
        first.wait(20)
        fourth.wait(20)
        assert connections.keys() == link.engine.lane_bytes().keys()
        link.local[:] = 0
        link.run(link.request(READ, 0, 0, SIZE))
        assert (link.local[: SIZE - 8192] == 2).all() and (link.local[SIZE - 8192 :] == 4).all()


def test_what_was_not_sent_does_not_wait_for_the_fence_of_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer is asked to end a connection over which WRITEs went, and is stopped."""
    monkeypatch.setattr(tcp, "FENCE_TIMEOUT", 1.0)
    with linked("tcp", SIZE, settings=Settings(tcp_lanes_per_peer=1)) as link:
        link.run(link.request(WRITE, 0, 0, SIZE))
        link.peer.suspend()
        sent = link.engine.submit(requests(link.request(WRITE, 0, 0, SIZE)))
        assert not sent.join(0.1)
        cancelling = threading.Thread(target=sent.cancel)
        cancelling.start()
        cancelling.join(0.5)
        assert cancelling.is_alive()  # the fence is on
        for opcode in (READ, WRITE):
            with lasting(0.2), pytest.raises(TransferTimeout):
                link.run(link.request(opcode, 0, 0, 4096), timeout=0.2)
        cancelling.join(1.0 + 1.0 + SLACK)
        assert sent.done and not cancelling.is_alive()
        link.peer.resume()
        link.run(link.request(WRITE, 0, 0, SIZE))


@pytest.mark.parametrize("lanes", [1, 3])
def test_small_writes_of_which_the_socket_took_a_part(monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    """Those that it took need the fence; all the others are over as soon as the connection is cut."""
    monkeypatch.setattr(tcp, "FENCE_TIMEOUT", 0.5)
    size = 4 << 20
    with linked("tcp", size, settings=Settings(tcp_lanes_per_peer=lanes)) as link:
        link.run(*[link.request(WRITE, at, at, 4096) for at in range(0, size, 4096)])
        link.peer.suspend()
        batches = [
            link.engine.submit(requests(*[link.request(WRITE, at, at, 4096) for at in range(0, size, 4096)]))
            for _ in range(20)
        ]
        assert not batches[0].join(0.3)
        with lasting(0):
            batches[-1].cancel()
        link.peer.resume()
        for batch in batches[:-1]:
            batch.wait(20)
        link.local[:] = 7
        link.run(link.request(WRITE, 0, 0, size))
        assert link.peer.call("uniform", link.remote) == 7


def test_a_peer_of_shared_memory_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is there to be copied; but how it is registered now, only it can tell."""
    monkeypatch.setattr(handoff, "TIMEOUT", 3.0)
    with linked("shm", 4096) as link:
        link.run(link.request(WRITE, 0, 0, 4096))
        link.peer.call("allocate", 4096)  # what is known of its registrations is out of date
        link.peer.suspend()
        with lasting(0.3), pytest.raises(TransferTimeout):
            link.run(link.request(READ, 0, 0, 64), timeout=0.3)
        queued = [link.engine.submit(requests(link.request(WRITE, 0, 0, 64))) for _ in range(3)]
        with lasting(0):
            queued[1].cancel()
        with lasting(1.5, 3.5), pytest.raises(PeerSilent, match="no answer within 3 s"):
            queued[0].wait(10)
        link.peer.resume()
        link.run(link.request(READ, 0, 0, 64))
        link.peer.call("allocate", 4096)
        link.run(link.request(READ, 0, 0, 64))
        link.peer.call("allocate", 4096)
        link.peer.suspend()
        batch = link.engine.submit(requests(link.request(READ, 0, 0, 64)))
        assert not batch.join(0.1)
        with lasting(0):
            link.engine.close()
        assert batch.done


def test_an_engine_with_stopped_peers_closes_at_once() -> None:
    """With bytes in their sockets, fences that they do not answer, and connections that they do not take."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(PeerProcess("P2PHANDSHAKE", "tcp", f"peer:{number}")) for number in range(2)]
        engine = stack.enter_context(TransferEngine("ours:1", "P2PHANDSHAKE", protocol="tcp", bind_address=HOST))
        local = engine.allocate(SIZE)
        links = [Link(engine, p, engine.open_segment(p.name), local, p.call("allocate", SIZE)) for p in peers]
        for link in links:
            link.run(link.request(WRITE, 0, 0, 1 << 20))
            link.peer.suspend()
        batches = [engine.submit(requests(link.request(WRITE, 0, 0, SIZE))) for link in links]
        assert not batches[0].join(0.2)
        links[0].segment.routes[0].lanes[0].interrupt()  # from now on it is fenced
        with lasting(0):
            engine.close()
        assert all(batch.done for batch in batches)
        for link in links:
            link.peer.resume()


def test_metadata_that_does_not_answer_keeps_no_batch(peer: PeerProcess) -> None:
    """A new connection begins with the descriptor; the peer is stopped, and tells it not."""
    with TransferEngine("ours:1", "P2PHANDSHAKE", protocol="tcp", bind_address=HOST) as engine:
        local, remote = engine.allocate(4096), peer.call("allocate", 4096)
        link = Link(engine, peer, engine.open_segment(peer.name), local, remote)
        link.run(link.request(READ, 0, 0, 4096))
        peer.call("cut_connections")
        peer.suspend()
        try:
            for opcode in (READ, WRITE):
                with lasting(0.3), pytest.raises(TransferTimeout):
                    link.run(link.request(opcode, 0, 0, 4096), timeout=0.3)
            with lasting(0):
                engine.close()
        finally:
            peer.resume()


# --- stopped or dead -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
def test_a_stopped_peer_is_told_from_a_dead_one(protocol: str, etcd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what transfers fail of, by `check` and by who may have its name."""
    monkeypatch.setattr(handoff, "TIMEOUT", 1.0)
    name = f"stopped-{protocol}:1"
    settings = Settings(tcp_progress_timeout=1.0, tcp_lanes_per_peer=1, handshake_connect_timeout=1.0)
    with (
        PeerProcess(etcd, protocol, name) as peer,
        TransferEngine("asking:1", etcd, protocol=protocol, bind_address=HOST, settings=settings) as engine,
    ):
        local, remote = engine.allocate(4096), peer.call("allocate", 4096)
        link = Link(engine, peer, engine.open_segment(name), local, remote)
        link.run(link.request(READ, 0, 0, 64))
        engine.check(name)
        peer.call("allocate", 4096)
        peer.suspend()
        with pytest.raises(TransferTimeout, match=rf"{name}.*(stopped, busy or cut off|no connection)"):
            link.run(link.request(READ, 0, 0, 64), timeout=0.7)
        with pytest.raises((TransferTimeout, PeerSilent), match=r"no progress for 1 s .*stopped|not answer.*stopped"):
            link.run(link.request(READ, 0, 0, 64))
        with lasting(0.3), pytest.raises(PeerSilent, match=r"no answer within 0\.\d+ s: stopped, busy or cut off"):
            engine.check(name, 0.3)
        assert not engine.probe(name, 0.3)
        with pytest.raises(NameInUse, match="is there and does not answer"):
            TransferEngine(name, etcd, protocol=protocol, bind_address=HOST)
        peer.process.kill()
        peer.process.wait()
        for _ in range(2):
            with pytest.raises(PeerLost, match="its process has ended") as dead:
                link.run(link.request(READ, 0, 0, 64))
            assert not isinstance(dead.value, PeerSilent)
        with pytest.raises(PeerLost, match="its process has ended"):
            engine.check(name)
        with TransferEngine(name, etcd, protocol=protocol, bind_address=HOST):
            engine.check(name)


def test_opening_and_telling_a_stopped_peer(etcd: str) -> None:
    """Within the time-outs of the metadata store and of connecting, as there is none of their own."""
    settings = Settings(metadata_timeout=0.5, handshake_connect_timeout=0.5)
    with (
        PeerProcess(etcd, "shm", "still:1") as peer,
        TransferEngine("asking:1", etcd, protocol="shm", bind_address=HOST, settings=settings) as engine,
    ):
        peer.suspend()
        with (
            lasting(0.5, 1.5),
            pytest.raises(PeerSilent, match=r"still:1.* within 0\.5 s .MC_HANDSHAKE"),
        ):
            engine.open_segment("still:1")
        peer.resume()
        segment = engine.open_segment("still:1")
        peer.suspend()
        with lasting(0.5), pytest.raises(PeerSilent, match=r"no answer within 0\.5 s"):
            engine.notify(segment, "a", "b")
        peer.resume()
        peer.process.kill()
        peer.process.wait()
        with lasting(0), pytest.raises(PeerLost, match="its process has ended"):
            engine.notify(segment, "a", "b")


def test_a_peer_that_is_cut_off_is_silent(peer: PeerProcess, hole: int) -> None:
    settings = Settings(handshake_connect_timeout=0.2)
    with reaching((HOST, hole), peer, settings) as link, lasting(0.6, 2), pytest.raises(PeerSilent, match=f":{hole}: "):
        link.run(link.request(WRITE, 0, 0, 64))


# --- buffers that a peer registers anew ------------------------------------------------------------------------------


@contextlib.contextmanager
def registered(protocol: str, lanes: int) -> Iterator[tuple[TransferEngine, Bytes, Link]]:
    """A target in this process with one buffer of random bytes, and what requests of a reader need of a link."""
    name, settings = f"memory://border-{protocol}-{lanes}", Settings(tcp_lanes_per_peer=lanes)
    with (
        TransferEngine("target:1", name, protocol=protocol, bind_address=HOST) as target,
        TransferEngine("reader:1", name, protocol=protocol, bind_address=HOST, settings=settings) as reader,
    ):
        weights = target.allocate(1 << 20)
        weights[:] = np.random.default_rng(1).integers(0, 256, weights.nbytes, np.uint8)
        nobody: PeerProcess = None  # type: ignore[assignment]
        link = Link(reader, nobody, reader.open_segment("target:1"), reader.allocate(1 << 20), weights.ctypes.data)
        link.run(link.request(READ, 0, 0, 1 << 20))
        yield target, weights, link


WAYS = pytest.mark.parametrize(("protocol", "lanes"), [("tcp", 1), ("tcp", 3), ("shm", 1)])


@WAYS
def test_a_buffer_that_is_registered_anew_as_several(protocol: str, lanes: int) -> None:
    """Requests that cross the new borders are cut anew: in every kind of batch, both ways, and again as one buffer."""
    with registered(protocol, lanes) as (target, weights, link):
        target.register_many([weights[:5000], weights[5000:9000], weights[9000:]])
        target.unregister(weights)
        link.local[:] = 0
        records = [link.request(READ, at, at, 3000) for at in range(0, 900_000, 3000)]
        batch = link.engine.submit(requests(*records))
        batch.wait(20)
        assert (batch.status == 1).all() and (link.local[:900_000] == weights[:900_000]).all()
        expected = weights.copy()
        expected[4000:10_000] = link.local[:6000] = 77
        link.run(link.request(WRITE, 0, 4000, 6000))
        assert (weights == expected).all()
        target.register(weights)
        target.unregister_many([weights[:5000], weights[5000:9000], weights[9000:]])
        link.local[:] = 0
        link.run(link.request(READ, 0, 0, 1 << 20))
        assert (link.local == expected).all()
        target.register_many([weights[:5000], weights[5000:]])
        target.unregister(weights)
        link.local[:] = 0

        async def read() -> None:
            await link.engine.submit(requests(link.request(READ, 0, 4000, 2000)))

        asyncio.run(read())
        assert (link.local[:2000] == expected[4000:6000]).all()


@WAYS
def test_memory_that_is_no_longer_registered_is_refused_whole(protocol: str, lanes: int) -> None:
    """With what lies beside it still there: nothing of the request is carried out."""
    with registered(protocol, lanes) as (target, weights, link):
        target.register(weights[:5000])
        target.unregister(weights)
        link.local[:] = 0
        for _ in range(2):
            with lasting(0), pytest.raises(AddressRejected):
                link.run(link.request(READ, 0, 4000, 2000))
            assert not link.local.any()
        link.run(link.request(READ, 0, 0, 5000))
        assert (link.local[:5000] == weights[:5000]).all()
