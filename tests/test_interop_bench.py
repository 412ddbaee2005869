"""Benches against the original's, through real commands and a real etcd; and its Python API, with bytes compared."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from interop import NEWEST, OUR_BENCH, PORT, VERSIONS, Peer, bench_target, peer_bench, run_bench

from mooncake_hpc import READ, REQUEST, WRITE, TransferEngine
from mooncake_hpc.control.client import exchange
from mooncake_hpc.core.errors import PeerLost
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.wire.rpc_frames import Kind

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

SETTINGS = Settings()
P2P = "P2PHANDSHAKE"
ROOM = 512 << 20
SIZES = (  # block × batch, with one thread
    (4096, 1), (4096, 128), (4096, 1024), (65536, 128), (65536, 1024), (1 << 20, 1), (1 << 20, 32),
    (16 << 20, 1), (16 << 20, 32),
)  # fmt: skip
SMALL = ("--block_size=65536", "--batch_size=32", "--threads=2", f"--buffer_size={16 << 20}", "--duration=1")
BRIEF = "--duration=0.3"  # of ours: the original's are whole seconds
PROTO_1 = {"MC_TCP_PROTO": "1"}
FRAMINGS = [pytest.param({}, id="v2"), pytest.param(PROTO_1, id="v1")]
POOLS = [pytest.param({"MC_TCP_ENABLE_CONNECTION_POOL": str(i)}, id=f"pool{i}") for i in (1, 0)]
OPERATIONS = ("read", "write")
size_axis = pytest.mark.parametrize(("block", "batch"), SIZES)
operation_axis = pytest.mark.parametrize("operation", OPERATIONS)
framing_axis = pytest.mark.parametrize("framing", FRAMINGS)
version_axis = pytest.mark.parametrize("version", VERSIONS)

_port = itertools.count(21000)


def unused_name() -> str:
    """A segment name that no other test uses; nothing listens on its port."""
    return f"127.0.0.1:{next(_port)}"


def size_flags(block: int, batch: int) -> tuple[str, ...]:
    footprint = max(16 << 20, block * batch)
    sizes = (f"--block_size={block}", f"--batch_size={batch}", f"--buffer_size={footprint}")
    return (*sizes, "--threads=1", "--duration=1")


# --- targets --------------------------------------------------------------------------------------------------


def published(etcd: str, name: str) -> str:
    """`name` once its segment stands in etcd with buffers, else ""."""
    with open_store(etcd, SETTINGS) as store:
        text = store.get(f"mooncake/ram/{name}") or ""
    return name if '"addr"' in text else ""


def answering(output: str) -> str:
    """The name of the target whose log this is in P2PHANDSHAKE mode, once it hands out buffers, else ""."""
    found = PORT.search(output) or ""
    if not found:
        return ""
    name = f"127.0.0.1:{found[1]}"
    try:
        descriptor = json.loads(exchange(name, Kind.METADATA, {}, 5, SETTINGS))
    except PeerLost:
        return ""
    return name if descriptor.get("buffers") else ""


def our_name(output: str) -> str:
    """The name that our target's log has, once it is ready, else ""."""
    words = output.partition("target ")[2].split()
    return words[0] if words[1:3] == ["is", "ready"] and output.endswith("\n") else ""


@pytest.fixture(scope="module")
def our_target(etcd: str) -> Iterator[str]:
    flags = (f"--metadata_server={etcd}", f"--local_server_name={unused_name()}", f"--buffer_size={ROOM}")
    with bench_target(OUR_BENCH, *flags, ready=our_name) as name:
        yield name


@pytest.fixture(scope="module", params=VERSIONS)
def original_target(request: pytest.FixtureRequest, etcd: str) -> Iterator[str]:
    name = unused_name()
    flags = (f"--metadata_server={etcd}", f"--local_server_name={name}", f"--buffer_size={64 << 20}")
    with bench_target(peer_bench(request.param), *flags, ready=lambda _: published(etcd, name)):
        yield name


@pytest.fixture(scope="module")
def large_original_target(etcd: str) -> Iterator[str]:
    name = unused_name()
    flags = (f"--metadata_server={etcd}", f"--local_server_name={name}", f"--buffer_size={ROOM}")
    with bench_target(peer_bench(NEWEST), *flags, ready=lambda _: published(etcd, name)):
        yield name


def initiate(command: tuple[str, ...], metadata: str, segment: str, *flags: str, **env: str) -> None:
    """An initiator that must end well, having moved something."""
    names = (f"--metadata_server={metadata}", f"--local_server_name={unused_name()}", f"--segment_id={segment}")
    batches, _ = run_bench(command, *names, *flags, **env)
    assert batches > 0


def initiate_both(command: tuple[str, ...], metadata: str, segment: str, *flags: str, **env: str) -> None:
    """As `initiate`, an initiator that reads and one that writes at the same time."""
    with ThreadPoolExecutor(len(OPERATIONS)) as pool:
        for each in [
            pool.submit(initiate, command, metadata, segment, *flags, f"--operation={o}", **env) for o in OPERATIONS
        ]:
            each.result()


# --- commands against commands --------------------------------------------------------------------------------


@version_axis
@framing_axis
@pytest.mark.parametrize("pool", POOLS)
def test_the_original_addresses_our_target(
    etcd: str, our_target: str, version: str, framing: dict[str, str], pool: dict[str, str]
) -> None:
    initiate_both(peer_bench(version), etcd, our_target, *SMALL, **framing, **pool)


@pytest.mark.slow
@size_axis
def test_sizes_of_the_originals_requests(etcd: str, our_target: str, block: int, batch: int) -> None:
    initiate_both(peer_bench(NEWEST), etcd, our_target, *size_flags(block, batch))


@operation_axis
@framing_axis
def test_we_address_the_originals_target(
    etcd: str, original_target: str, operation: str, framing: dict[str, str]
) -> None:
    flags = (*SMALL, BRIEF, f"--operation={operation}", "--verify", "--workers=0")
    initiate(OUR_BENCH, etcd, original_target, *flags, **framing)


@pytest.mark.slow
@size_axis
def test_sizes_of_our_requests(etcd: str, large_original_target: str, block: int, batch: int) -> None:
    initiate_both(OUR_BENCH, etcd, large_original_target, *size_flags(block, batch), BRIEF)


@version_axis
def test_peer_to_peer_handshake(version: str) -> None:
    """No metadata server: names are the addresses of RPC ports."""
    flags = (f"--metadata_server={P2P}", "--local_server_name=127.0.0.1:1", *SMALL)
    with bench_target(OUR_BENCH, *flags, ready=our_name) as name:
        initiate_both(peer_bench(version), P2P, name, *SMALL)
    with bench_target(peer_bench(version), *flags, ready=answering) as name:
        for operation in OPERATIONS:
            ours = (*SMALL, BRIEF, f"--operation={operation}", "--verify", "--workers=0")
            initiate(OUR_BENCH, P2P, name, *ours)


# --- Python API -----------------------------------------------------------------------------------------------

LENGTH = 6 << 20
LENGTHS = (1, 7, 4096, 65535, 65537, 1 << 20, (4 << 20) + 1)
BYTES = npt.NDArray[np.uint8]


def pieces(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """(offset, length) of requests of these lengths, one byte between them."""
    ends = list(itertools.accumulate(length + 1 for length in lengths))
    return [(end - length - 1, length) for end, length in zip(ends, lengths, strict=True)]


def uneven(count: int) -> list[tuple[int, int]]:
    """(offset, length) of requests that cover LENGTH bytes, of uneven lengths, shuffled."""
    chooser = random.Random(count)
    borders = [0, *sorted(chooser.sample(range(1, LENGTH), count - 1)), LENGTH]
    found = [(a, b - a) for a, b in itertools.pairwise(borders)]
    chooser.shuffle(found)
    return found


SINGLE, BATCH = pieces(LENGTHS), uneven(300)


def pattern(seed: int) -> BYTES:
    """What Peer.fill(seed) writes."""
    return np.frombuffer(random.Random(seed).randbytes(LENGTH), np.uint8)


def sha256(data: BYTES) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()


class Ours:
    """Our engine with one buffer of LENGTH bytes, and the original's on the other side."""

    def __init__(self, version: str, metadata: str, framing: dict[str, str]) -> None:
        settings = Settings(tcp_proto=1 if framing else 2)
        names = unused_name(), unused_name()
        self.engine = TransferEngine(names[0], metadata, protocol="tcp", bind_address="127.0.0.1", settings=settings)
        try:
            self.buffer: BYTES = self.engine.allocate(LENGTH)
            self.peer = Peer(version, LENGTH, metadata, names[1], **framing)
        except BaseException:
            self.engine.close()
            raise
        self.segment = self.engine.open_segment(self.peer.name)
        self.address = int(self.buffer.ctypes.data)

    def move(self, opcode: int, parts: list[tuple[int, int]]) -> None:
        """Our transfers of `parts` between the buffers: a call each, or BATCH as one batch."""
        if parts is not BATCH:
            call = self.engine.read if opcode == READ else self.engine.write
            for offset, length in parts:
                call(self.buffer[offset : offset + length], self.segment, self.peer.buffer + offset)
            return
        requests = np.zeros(len(parts), REQUEST)
        offsets, requests["length"] = (np.array(column, np.uint64) for column in zip(*parts, strict=True))
        requests["opcode"], requests["target_id"] = opcode, self.segment.id
        requests["local_addr"] = np.uint64(self.address) + offsets
        requests["remote_addr"] = np.uint64(self.peer.buffer) + offsets
        self.engine.submit(requests).wait(60)

    def call(self, operation: str, parts: list[tuple[int, int]]) -> int:
        """The original's transfers of `parts` between its buffer and ours: a call each, or BATCH as one batch."""
        requests = [(self.peer.buffer + offset, self.address + offset, length) for offset, length in parts]
        if parts is BATCH:
            columns = [list(column) for column in zip(*requests, strict=True)]
            return int(self.peer.call(f"batch_transfer_sync_{operation}", self.engine.name, *columns))
        return sum(self.peer.call(f"transfer_sync_{operation}", self.engine.name, *request) for request in requests)

    def close(self) -> None:
        self.peer.close()
        self.engine.close()
        del self.buffer  # the memory lives as long as a view of it


@pytest.fixture(params=itertools.product(VERSIONS, ("etcd", "P2PHANDSHAKE"), ("v2", "v1")), ids="-".join)
def pair(request: pytest.FixtureRequest, etcd: str, no_leaks: None) -> Iterator[Ours]:
    version, metadata, framing = request.param
    both = Ours(version, etcd if metadata == "etcd" else metadata, PROTO_1 if framing == "v1" else {})
    yield both
    both.close()


def test_python_apis_move_the_same_bytes(pair: Ours) -> None:
    """Reads and writes by both sides, single and in a batch of 300 uneven requests."""
    for seed, parts in ((0, SINGLE), (10, BATCH)):
        check_the_originals_calls(pair, parts, seed)
        check_our_calls(pair, parts, seed + 5)


def check_the_originals_calls(pair: Ours, parts: list[tuple[int, int]], seed: int) -> None:
    """What it writes here, and what it reads from here."""
    pair.buffer[:] = 0
    pair.peer.call("fill", seed)
    assert pair.call("write", parts) == 0
    wanted = inside(parts, pattern(seed), np.zeros(LENGTH, np.uint8))
    deadline = time.monotonic() + 10  # a v1 write is not acknowledged
    while not np.array_equal(pair.buffer, wanted) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert np.array_equal(pair.buffer, wanted)
    pair.buffer[:] = pattern(seed + 1)
    assert pair.call("read", parts) == 0
    assert pair.peer.call("digest") == sha256(inside(parts, pattern(seed + 1), pattern(seed)))


def check_our_calls(pair: Ours, parts: list[tuple[int, int]], seed: int) -> None:
    """What we read from it, and what we write there."""
    pair.buffer[:] = 0
    pair.peer.call("fill", seed)
    pair.move(READ, parts)
    assert np.array_equal(pair.buffer, inside(parts, pattern(seed), np.zeros(LENGTH, np.uint8)))
    pair.buffer[:] = pattern(seed + 1)
    pair.move(WRITE, parts)
    assert pair.peer.call("digest") == sha256(inside(parts, pattern(seed + 1), pattern(seed)))


def inside(parts: list[tuple[int, int]], source: BYTES, around: BYTES) -> BYTES:
    """`source` in `parts`, `around` elsewhere."""
    result = around.copy()
    for offset, length in parts:
        result[offset : offset + length] = source[offset : offset + length]
    return result
