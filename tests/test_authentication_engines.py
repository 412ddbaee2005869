"""Engines with the right, a wrong and no secret, in every pairing, over every transport and kind of metadata."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import fake_fabric
import numpy as np
import pytest

from mooncake_hpc import READ, REQUEST, WRITE, TransferEngine
from mooncake_hpc.core.errors import AuthenticationError, NameInUse, PeerLost, TransferTimeout
from mooncake_hpc.core.settings import RdmaSettings, Settings
from mooncake_hpc.metadata.memory import MemoryStore
from mooncake_hpc.p2p import P2PStore
from mooncake_hpc.testing.peer import PeerProcess, pattern

SECRETS = {"right": "the secret of these tests", "wrong": "the secret of other tests"}
SIZE = 100_000
WAYS = [("tcp", "memory"), ("tcp", "P2PHANDSHAKE"), ("shm", "memory"), ("auto", "memory"), ("auto", "P2PHANDSHAKE")]
PAIRS = [  # whose engine has which, what the reader is told
    ("right", "right", ""),
    ("right", "wrong", "has another secret than this process"),
    ("right", "", "this process has no secret: give it the peer's"),
    ("", "right", "it has no secret, or is not of this package"),
]
numbers = itertools.count()

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Secret files by name; "" is none."""
    folder = tmp_path_factory.mktemp("secrets")
    for name, content in SECRETS.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o600)
    return {name: str(folder / name) for name in SECRETS} | {"": ""}


def settings(file: str, allowed: str = "", **values: object) -> Settings:
    return Settings(
        secret_file=file,
        allow_unauthenticated=allowed,
        rdma=RdmaSettings(rail_pause=0.2),
        **values,  # type: ignore[arg-type]
    )


def engine(name: str, metadata: str | MemoryStore, protocol: str, known: Settings, **options: str) -> TransferEngine:
    return TransferEngine(name, metadata, protocol=protocol, bind_address="127.0.0.1", settings=known, **options)


def spec(metadata: str) -> str:
    return metadata if metadata == "P2PHANDSHAKE" else f"memory://authentication-{next(numbers)}"


def move(ours: TransferEngine, there: TransferEngine, theirs: np.ndarray) -> None:
    """Read what they have and write it back, changed."""
    local = ours.allocate(SIZE)
    segment = ours.open_segment(there.name)
    theirs[:] = 7
    ours.read(local, segment, theirs.ctypes.data)
    assert (local == 7).all()
    local[:] = 9
    ours.write(local, segment, theirs.ctypes.data)
    assert (theirs == 9).all()


@pytest.mark.parametrize(("protocol", "metadata"), WAYS)
@pytest.mark.parametrize(("theirs", "ours", "text"), PAIRS)
def test_only_those_with_the_same_secret_move_bytes(
    files: dict[str, str], protocol: str, metadata: str, theirs: str, ours: str, text: str
) -> None:
    store = spec(metadata)
    with (
        engine("there:1", store, protocol, settings(files[theirs])) as there,
        engine("here:1", store, protocol, settings(files[ours])) as here,
    ):
        memory = there.allocate(SIZE)
        if not text:
            move(here, there, memory)
            assert here.probe(there.name)
            here.notify(here.open_segment(there.name), "a", "text")
            assert there.notifications() == [("a", "text")]
            return
        began = time.monotonic()
        with pytest.raises(AuthenticationError, match=text) as failure:
            move(here, there, memory)
        assert isinstance(failure.value, PeerLost) and isinstance(failure.value, PermissionError)
        assert metadata == "P2PHANDSHAKE" or f"segment '{there.name}' at " in str(failure.value)
        assert time.monotonic() - began < 3 and not (memory == 9).any()
        with pytest.raises(AuthenticationError, match=text):
            here.probe(there.name)


@pytest.mark.parametrize("opcode", [READ, WRITE])
def test_version_1_of_the_data_protocol_tells_it_too(files: dict[str, str], opcode: int) -> None:
    store = spec("memory")
    with (
        engine("there:1", store, "tcp", settings(files["right"], tcp_proto=1)) as there,
        engine("here:1", store, "tcp", settings("")) as here,
    ):
        theirs, ours = there.allocate(SIZE), here.allocate(SIZE)
        segment = here.open_segment(there.name)
        call = here.read if opcode == READ else here.write
        with pytest.raises(AuthenticationError, match="this process has no secret"):
            call(ours, segment, theirs.ctypes.data)


def test_deadlines_hold_while_a_stopped_peer_proves_nothing(files: dict[str, str]) -> None:
    env = {**os.environ, "MOONCAKE_HPC_SECRET_FILE": files["right"]}
    with PeerProcess("P2PHANDSHAKE", "tcp", env=env) as peer:
        with engine("here:1", "P2PHANDSHAKE", "tcp", settings(files["right"])) as here:
            theirs, ours = peer.call("allocate", SIZE, 3), here.allocate(SIZE)
            segment = here.open_segment(peer.name)
            peer.suspend()
            began = time.monotonic()
            with pytest.raises(TransferTimeout):
                here.read(ours, segment, theirs, timeout=0.5)
            assert time.monotonic() - began < 1.0
            peer.resume()
            here.read(ours, segment, theirs)
            assert (ours == pattern(3, SIZE)).all()
            peer.suspend()
            for lane in segment.routes[0].lanes:
                lane.interrupt()
            batch = here.submit(np.array([(READ, segment.id, ours.ctypes.data, theirs, SIZE)], REQUEST))
            batch.join(0.3)
            began = time.monotonic()
        assert time.monotonic() - began < 1.5 and batch.done
        peer.resume()


@pytest.mark.parametrize(("theirs", "ours", "text"), PAIRS)
def test_rdma_connects_no_queue_pair_without_proof(files: dict[str, str], theirs: str, ours: str, text: str) -> None:
    store = spec("memory")
    with (
        fake_fabric.installed() as fabric,
        engine("there:1", store, "rdma", settings(files[theirs]), device_name="a") as there,
        engine("here:1", store, "rdma", settings(files[ours]), device_name="b") as here,
    ):
        memory = there.allocate(SIZE)
        if not text:
            move(here, there, memory)
            return
        with pytest.raises(AuthenticationError, match=text):
            move(here, there, memory)
        assert not any(pair.peer for pair in fabric.pairs.values())


@pytest.mark.parametrize("protocol", ["tcp", "auto"])
def test_an_allowed_address_is_spoken_to_in_both_roles(files: dict[str, str], protocol: str) -> None:
    for metadata in ("memory", "P2PHANDSHAKE"):
        store = spec(metadata)
        with (
            engine("plain:1", store, protocol, settings("")) as plain,
            engine("guarded:1", store, protocol, settings(files["right"], "127.0.0.0/8")) as guarded,
        ):
            move(plain, guarded, guarded.allocate(SIZE))
            move(guarded, plain, plain.allocate(SIZE))


@pytest.mark.parametrize("ours", ["right", "wrong", ""])
def test_the_name_of_a_living_process_is_taken_whatever_its_secret(files: dict[str, str], ours: str) -> None:
    store = spec("memory")
    with (
        engine("one:1", store, "tcp", settings(files["right"])),
        pytest.raises(NameInUse, match="'one:1' belongs to a living process"),
    ):
        engine("one:1", store, "tcp", settings(files[ours]))


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
def test_a_record_that_points_to_another_process_is_found_out(files: dict[str, str], protocol: str) -> None:
    """Who can write to the metadata store cannot make a peer with the secret stand for another segment."""
    known = settings(files["right"])
    with (
        MemoryStore(f"forged-{next(numbers)}") as store,
        engine("there:1", store, protocol, known) as there,
        engine("here:1", store, protocol, known) as here,
    ):
        theirs, ours = there.allocate(SIZE), here.allocate(SIZE)
        for kind in ("ram", "rpc_meta"):
            value = store.get(f"mooncake/{kind}/there:1")
            assert value is not None
            forged = value.replace("there:1", "ghost:1").replace(there.generation, "0123456789abcdef")
            store.publish(f"mooncake/{kind}/ghost:1", forged)
        with pytest.raises(AuthenticationError, match=r"segment 'ghost:1' at .* another process answers"):
            here.write(ours, here.open_segment("ghost:1"), theirs.ctypes.data)
        assert not here.probe("ghost:1")


def test_what_was_connected_before_goes_on_and_what_breaks_is_proved_anew(files: dict[str, str]) -> None:
    store = spec("memory")
    with (
        engine("there:1", store, "tcp", settings(files["right"])) as there,
        engine("here:1", store, "tcp", settings(files["right"])) as here,
    ):
        memory = there.allocate(SIZE)
        for _ in range(3):
            move(here, there, memory)
            there._transports[0].server.cut()  # type: ignore[attr-defined]


@contextmanager
def store(name: str, metadata: str, known: Settings) -> Iterator[P2PStore]:
    with P2PStore(name, metadata, protocol="tcp", settings=known, bind_address="127.0.0.1") as made:
        yield made


def test_objects_are_pulled_with_the_secret_only(files: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    metadata = spec("memory")
    data = np.arange(300_000, dtype=np.uint32)
    with store("trainer:1", metadata, settings(files["right"])) as trainer:
        trainer.register("model", data)
        with store("reader:1", metadata, settings(files["right"])) as reader:
            got = np.zeros_like(data)
            reader.get_replica("model", got, timeout=20)
            assert (got == data).all()
        with store("reader:2", metadata, settings(files["wrong"])) as reader:
            got = np.zeros_like(data)
            with pytest.raises(AuthenticationError, match=r"object 'model' .*has another secret"):
                reader.get_replica("model", got)
            assert not got.any()
    caplog.clear()  # errors in it hold what was mapped


def test_no_text_of_an_engine_shows_the_secret(files: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    metadata = spec("memory")
    texts = []
    with (
        engine("there:1", metadata, "auto", settings(files["right"])) as there,
        engine("here:1", metadata, "auto", settings(files["wrong"])) as here,
    ):
        memory = there.allocate(SIZE)
        try:
            move(here, there, memory)
        except AuthenticationError as error:
            texts.append(repr(error))
        texts += [
            repr(here),
            repr(vars(here)),
            repr(here._settings),
            here.open_segment(there.name).descriptor.to_json(),
        ]
    texts += [record.getMessage() for record in caplog.records]
    caplog.clear()  # errors in it hold what was mapped
    assert texts and not any(secret in text for text in texts for secret in SECRETS.values())
