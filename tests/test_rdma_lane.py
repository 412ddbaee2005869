"""The RDMA transport over devices of software in this process: what real ones do seldom, and cannot be asked to."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import mmap
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_fabric
import numpy as np
import pytest
from fake_fabric import Fabric

from mooncake_hpc import READ, REQUEST, WRITE, TransferEngine
from mooncake_hpc.core.errors import AddressRejected, PeerLost, TransferCancelled, TransferError, TransferTimeout
from mooncake_hpc.core.settings import RdmaSettings, Settings
from mooncake_hpc.testing.peer import pattern
from mooncake_hpc.transports.rdma import rail_kernels as rails
from mooncake_hpc.transports.rdma.poll_kernels import UNDRAINED
from mooncake_hpc.wire.rdma_handshake import Hello

SIZE = 3 << 20
numbers = itertools.count()


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with fake_fabric.installed() as fabric:
        yield fabric
        assert not fabric.devices and not fabric.pairs and not fabric.queues and not fabric.regions


def rdma(**values: Any) -> Settings:
    return Settings(rdma=RdmaSettings(**{"rail_pause": 0.3, **values}))


def engine(store: str, name: str, devices: str, settings: Settings | None = None, **options: Any) -> TransferEngine:
    return TransferEngine(
        name, store, protocol="rdma", bind_address="127.0.0.1", device_name=devices,
        settings=settings or rdma(), **options,
    )  # fmt: skip


class Pair:
    """Two engines and memory of the same size on both."""

    def __init__(self, here: TransferEngine, there: TransferEngine) -> None:
        self.here, self.there = here, there
        self.ours, self.theirs = here.allocate(SIZE), there.allocate(SIZE)
        self.segment = here.open_segment(there.name)

    def request(self, opcode: int, ours: int, theirs: int, length: int) -> tuple[int, int, int, int, int]:
        return (
            opcode, self.segment.id, int(self.ours.ctypes.data) + ours, int(self.theirs.ctypes.data) + theirs, length,
        )  # fmt: skip

    def submit(self, *records: tuple[int, int, int, int, int]) -> Any:
        return self.here.submit(np.array(list(records), REQUEST))


@contextlib.contextmanager
def pair(here: str, there: str, settings: Settings | None = None, theirs: Settings | None = None) -> Iterator[Pair]:
    store = f"memory://fabric-{next(numbers)}"
    with engine(store, "there:1", there, theirs or settings) as b, engine(store, "here:1", here, settings) as a:
        yield Pair(a, b)


# --- bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [("a", "b"), ("a", "a"), ("a,b", "c,d"), ("a,b", "c"), ("a", "b,c,d")])
def test_bytes_arrive_both_ways(fabric: Fabric, devices: tuple[str, str]) -> None:
    with pair(*devices, settings=rdma(max_mr_size=1 << 20)) as link:
        link.theirs[:] = pattern(1, SIZE)
        link.here.read(link.ours[5:], link.segment, int(link.theirs.ctypes.data) + 5)
        assert (link.ours[5:] == link.theirs[5:]).all() and not link.ours[:5].any()
        link.ours[:] = pattern(2, SIZE)
        link.here.write(link.ours[:-3], link.segment, int(link.theirs.ctypes.data) + 3)
        assert (link.theirs[3:] == link.ours[:-3]).all() and (link.theirs[:3] == pattern(1, 3)).all()
        assert link.here.lane_bytes() == {"rdma/there:1/0": 2 * SIZE - 8}


def test_a_segment_reaches_itself(fabric: Fabric) -> None:
    with engine("memory://self", "self:1", "a,b") as one:
        memory = one.allocate(SIZE)
        memory[: SIZE // 2] = pattern(3, SIZE // 2)
        one.write(memory[: SIZE // 2], one.open_segment("self:1"), int(memory.ctypes.data) + SIZE // 2)
        assert (memory[SIZE // 2 :] == pattern(3, SIZE // 2)).all()


def test_both_open_at_once_and_share_the_queue_pairs(fabric: Fabric) -> None:
    with pair("a", "b") as link:
        back = link.there.open_segment("here:1")
        mine, yours = link.here.allocate(4096), link.there.allocate(4096)
        mine[:], yours[:] = 1, 2
        start = threading.Barrier(2)

        def write(engine: TransferEngine, source: Any, segment: Any, target: int) -> None:
            start.wait()
            for _ in range(30):
                engine.write(source, segment, target)

        threads = [
            threading.Thread(target=write, args=(link.here, mine, link.segment, link.theirs.ctypes.data)),
            threading.Thread(target=write, args=(link.there, yours, back, link.ours.ctypes.data)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert (link.theirs[:4096] == 1).all() and (link.ours[:4096] == 2).all()
        assert len(fabric.pairs) == 4


@pytest.mark.parametrize(("ours", "theirs"), [(1, 3), (4, 2)])
def test_the_smaller_number_of_queue_pairs(fabric: Fabric, ours: int, theirs: int) -> None:
    with pair("a", "b", rdma(queue_pairs=ours), rdma(queue_pairs=theirs)) as link:
        link.ours[:] = pattern(4, SIZE)
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert (link.theirs == link.ours).all()
        assert len(fabric.pairs) == 2 * min(ours, theirs)


def test_what_the_variables_say_reaches_the_queue_pairs(fabric: Fabric) -> None:
    settings = rdma(mtu=1024, traffic_class=96, service_level=3, pkey_index=1)
    with pair("a", "b", settings, rdma(mtu=2048)) as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        ours, theirs = fabric.links[-1], fabric.links[0]
        assert ours.mtu == theirs.mtu == 1024
        assert (ours.traffic_class, ours.service_level, ours.pkey_index) == (96, 3, 1)


@pytest.mark.parametrize("depth", [1, 4])
def test_few_work_requests_make_back_pressure(fabric: Fabric, depth: int) -> None:
    with pair("a", "b", rdma(max_wr=depth, queue_pairs=1)) as link:
        link.ours[:] = pattern(5, SIZE)
        link.submit(*[link.request(WRITE, 500 * i, 500 * i, 500) for i in range(SIZE // 500)]).wait(30)
        assert (link.theirs[: SIZE // 500 * 500] == link.ours[: SIZE // 500 * 500]).all()


@pytest.mark.parametrize(("nbytes", "lengths"), [(20_000, [8192, 11808]), (20_481, [8192, 8192, 4097])])
def test_slices(fabric: Fabric, nbytes: int, lengths: list[int]) -> None:
    """A tail of at most a half, here, of a slice goes with the slice before it."""
    with pair("a", "b", rdma(slice_size=8192, fragment_ratio=2)) as link:
        link.here.write(link.ours[:nbytes], link.segment, link.theirs.ctypes.data)
        assert sorted(fabric.lengths) == sorted(lengths)


def test_what_the_variables_say_reaches_queues_and_regions(fabric: Fabric) -> None:
    with pair("a", "b", rdma(max_cqe=20, relaxed_ordering=False), rdma(max_wr=8)) as link:
        link.ours[:] = pattern(6, SIZE)
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert (link.theirs == link.ours).all()
        assert sorted((queue.depth, fabric_depth(fabric, queue)) for queue in fabric.queues.values()) == [(16, {8})] * 2
        assert {(region.device, region.relaxed) for region in fabric.regions.values()} == {("a", False), ("b", True)}


def fabric_depth(fabric: Fabric, queue: Any) -> set[int]:
    return {made.depth for made in fabric.pairs.values() if made.queue is queue}


@pytest.mark.slow
def test_a_batch_that_waits_for_the_device_takes_no_processor(fabric: Fabric) -> None:
    """Who waits polls for a moment and then sleeps until the device tells; so does the lane's thread."""
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        fabric.held = True
        batch = link.submit(link.request(WRITE, 0, 0, 1 << 20))
        used = time.process_time()
        with pytest.raises(TransferTimeout):
            batch.wait(1.0)
        assert time.process_time() - used < 0.3
        fabric.release()
        batch.wait(10)


def test_events_that_only_woke_somebody_are_taken_out_now_and_then(fabric: Fabric) -> None:
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        (lane,) = link.segment.routes[0].lanes
        (queue,) = {made.queue for made in fabric.pairs.values() if made.device == "a"}
        before = queue.drained
        lane.words[rails.SLEEPS // 8] = UNDRAINED - 1
        fabric.held = True
        batch = link.submit(link.request(WRITE, 0, 0, 1 << 20))
        assert not batch.join(0.1)
        fabric.release()
        batch.wait(10)
        deadline = time.monotonic() + 10
        while queue.drained == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_device_that_carries_out_what_is_posted_at_once(fabric: Fabric) -> None:
    """As soft-RoCE does: while the leader is in such a call, the lane's thread sleeps."""
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        fabric.post_seconds = 0.5
        used = time.process_time()
        link.submit(link.request(WRITE, 0, 0, 4096)).wait(10)
        assert time.process_time() - used < 0.2


# --- devices --------------------------------------------------------------------------------------------------


def test_requests_use_both_devices(fabric: Fabric) -> None:
    with pair("a,b", "c,d") as link:
        for _ in range(20):
            link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert min(fabric.carried["a"], fabric.carried["b"]) > 5 * SIZE


def matrix(tmp_path: Path, near: str, other: str) -> str:
    file = tmp_path / f"{near}.json"
    file.write_text(json.dumps({location: [[near], [other]] for location in ("cpu:0", "cpu:1")}))
    return str(file)


@pytest.mark.slow
def test_other_devices_carry_only_when_the_near_one_is_gone(fabric: Fabric, tmp_path: Path) -> None:
    store = "memory://matrix"
    with (
        engine(store, "there:1", "", nic_priority_matrix=matrix(tmp_path, "c", "d")) as there,
        engine(store, "here:1", "", nic_priority_matrix=matrix(tmp_path, "a", "b")) as here,
    ):
        link = Pair(here, there)
        here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert fabric.carried == {"a": SIZE}
        fabric.unplug("a")
        here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert fabric.carried == {"a": SIZE, "b": SIZE}
        fabric.plug("a")
        deadline = time.monotonic() + 10
        while fabric.carried["a"] == SIZE:
            here.write(link.ours, link.segment, link.theirs.ctypes.data)
            assert time.monotonic() < deadline


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False], ids=["event", "no event"])
@pytest.mark.parametrize("opcode", [READ, WRITE])
def test_a_device_goes_while_it_carries(fabric: Fabric, opcode: int, told: bool) -> None:
    """What it carried is done by the other one, and after its pause it carries again."""
    with pair("a,b", "c,d") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        link.ours[:], link.theirs[:] = pattern(6, SIZE), pattern(7, SIZE)
        fabric.held = True
        batch = link.submit(*[link.request(opcode, at, at, 1 << 16) for at in range(0, SIZE, 1 << 16)])
        assert not batch.join(0.1)
        before = fabric.carried["a"]
        if told:
            fabric.unplug("a")
        else:
            fabric.dead_paths |= {("a", "c"), ("a", "d")}
        fabric.release()
        batch.wait(20)
        assert (link.ours == link.theirs).all() and (batch.status == 1).all() and fabric.carried["a"] == before
        fabric.dead_paths.clear()
        fabric.plug("a")
        deadline = time.monotonic() + 10
        while fabric.carried["a"] == before:
            link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.slow
def test_with_every_path_gone_the_first_cause_is_told(fabric: Fabric) -> None:
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        fabric.dead_paths.add(("a", "b"))
        with pytest.raises(PeerLost, match=r"here:1@a to there:1@b: retry exc err") as caught:
            link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert "flush" not in str(caught.value)
        fabric.dead_paths.clear()
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)


def test_the_only_device_is_down(fabric: Fabric) -> None:
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        fabric.unplug("a")
        with pytest.raises(TransferError, match="a port 1"):
            for _ in range(1000):
                link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
                time.sleep(0.01)
        fabric.plug("a")
        deadline = time.monotonic() + 10
        while True:
            try:
                return link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
            except TransferError:
                assert time.monotonic() < deadline


def test_a_gid_that_does_not_connect_is_replaced_and_published(fabric: Fabric) -> None:
    fabric.bad_gid_indices.update(a={1}, b={1})
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert {made.gid_index for made in fabric.links} == {2}
        published = link.there.open_segment("here:1").descriptor.devices[0].gid
        assert published.startswith("02:02")


def test_a_gid_that_the_peer_cannot_reach_is_replaced(fabric: Fabric) -> None:
    """As where all the peer's addresses are of another family than our best."""
    fabric.unreachable.add(bytes([1]) * 15 + b"\x01")
    fabric.gid_indices["b"] = (5, 6)
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert {made.gid_index for made in fabric.links} == {2, 5}
        assert link.there.open_segment("here:1").descriptor.devices[0].gid.startswith("02:02")


def test_a_peer_that_no_gid_reaches_takes_none_from_others(fabric: Fabric) -> None:
    """Whoever asks with such a GID is refused, after all of ours were tried, and the best one stays ours."""
    with pair("a", "b") as link:
        gone = bytes([7]) * 16
        fabric.unreachable.add(gone)
        lane: Any = link.there.open_segment("here:1").routes[0].lanes[0]
        for number in range(2):
            request = Hello(f"stranger:{number}@a", "there:1@b", (1,), gid=gone).to_json()
            reply = lane._pool.answer(json.dumps(request))
            assert "no route" in reply["reply_msg"] and "index 3" in reply["reply_msg"], reply
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert {made.gid_index for made in fabric.links} == {1}
        assert link.there.open_segment("there:1").descriptor.devices[0].gid.startswith("01:01")


def test_endpoints_that_no_peer_confirms_do_not_pile_up(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers that ask for connections and go: their paths and queue pairs are let go, those in use stay."""
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, int(link.theirs.ctypes.data))
        pool = link.there.open_segment("here:1").routes[0].lanes[0]._pool  # type: ignore[attr-defined]
        known = [endpoint.peer_path for sieve in pool._known for endpoint in sieve]
        for number in range(20):
            request = Hello(f"stranger:{number}@a", "there:1@b", (number,), gid=bytes(16), ready=False)
            assert not pool.answer(json.dumps(request.to_json()))["reply_msg"]
        assert len([endpoint for sieve in pool._known for endpoint in sieve]) == len(known) + 20
        pool.reclaim()
        assert len([endpoint for sieve in pool._known for endpoint in sieve]) == len(known) + 20  # not yet
        monkeypatch.setattr("mooncake_hpc.transports.rdma.pool.UNCONFIRMED_LIFE_S", -1.0)
        pool.reclaim()
        assert [endpoint.peer_path for sieve in pool._known for endpoint in sieve] == known
        link.here.write(link.ours, link.segment, int(link.theirs.ctypes.data))


def test_an_address_that_changes_is_published_and_used(fabric: Fabric) -> None:
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        fabric.change_gids("a", 5, 3)
        deadline = time.monotonic() + 10
        while not link.there.open_segment("here:1").refresh().devices[0].gid.startswith("05:05"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        link.here.write(link.ours, link.here.open_segment("here:1"), link.ours.ctypes.data)
        assert {made.gid_index for made in fabric.links} == {1, 5}


@pytest.mark.parametrize("devices", [("a", "b"), ("a,b", "c,d")])
def test_a_post_that_fails_half_way(fabric: Fabric, devices: tuple[str, str]) -> None:
    """What was taken of it and done says nothing by itself; nobody waits for it all the same."""
    with pair(*devices) as link:
        link.ours[:] = pattern(8, SIZE)
        link.here.read(link.ours[:1], link.segment, link.theirs.ctypes.data)
        link.ours[:] = pattern(8, SIZE)
        fabric.refuse_posts = 1
        began = time.monotonic()
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert (link.theirs == link.ours).all() and fabric.refuse_posts == 0
        assert time.monotonic() - began < 1.5  # the time for devices that give nothing back is 2 s


@pytest.mark.slow
def test_a_device_that_gives_nothing_back(fabric: Fabric) -> None:
    """Its queue pairs are destroyed after a while: then it cannot touch the memory, and closing ends in time."""
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        fabric.held = fabric.silent = True
        batch = link.submit(link.request(WRITE, 0, 0, SIZE))
        began = time.monotonic()
        batch.cancel()
        assert batch.done and time.monotonic() - began < 8
        with pytest.raises(TransferCancelled):
            batch.wait(1)


# --- peers and registrations ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_registered_again_at_its_address(fabric: Fabric) -> None:
    """The key that we know is another registration's: refused, looked up again, good."""
    with pair("a", "b") as link:
        memory = np.zeros(1 << 16, np.uint8)
        address = int(memory.ctypes.data)
        link.there.register(memory)
        link.ours[: 1 << 16] = 1
        link.here.write(link.ours[: 1 << 16], link.segment, address)
        link.there.unregister(memory)
        link.there.register(memory)
        link.ours[: 1 << 16] = 2
        link.here.write(link.ours[: 1 << 16], link.segment, address)
        assert (memory == 2).all()
        link.there.unregister(memory)
        with pytest.raises(AddressRejected, match="there:1"):
            link.here.write(link.ours[: 1 << 16], link.segment, address)
        assert (memory == 2).all()
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)


def test_memory_registered_again_as_several_buffers(fabric: Fabric) -> None:
    """Slices cross the new borders: they are refused, and cut anew, those that wait behind them as well."""
    with pair("a", "b", rdma(slice_size=16_384)) as link:
        memory = np.zeros(1 << 18, np.uint8)
        address = int(memory.ctypes.data)
        link.there.register(memory)
        link.here.write(link.ours[: 1 << 18], link.segment, address)
        for number in range(1, 4):
            borders = [0, 5000 * number, 5000 * number + 7, 90_000 + number, 1 << 18]
            parts = [memory[begin:end] for begin, end in itertools.pairwise(borders)]
            link.there.register_many(parts)
            link.there.unregister(memory)
            link.ours[:] = pattern(number, SIZE)
            requests = [(WRITE, link.segment.id, int(link.ours.ctypes.data) + at, address + at, 20_000)
                        for at in range(0, 240_000, 20_000)]  # fmt: skip
            batch = link.submit(*requests)
            link.here.write(link.ours[240_000 : 1 << 18], link.segment, address + 240_000)
            batch.wait(10)
            assert (batch.status == 1).all() and (memory == link.ours[: 1 << 18]).all()
            link.there.register(memory)
            link.there.unregister_many(parts)
            link.here.read(link.ours[: 1 << 18], link.segment, address)
            assert (memory == link.ours[: 1 << 18]).all()
        link.there.unregister(memory)
        link.there.register(memory[:5000])
        with pytest.raises(AddressRejected, match="there:1"):
            link.here.write(link.ours[: 1 << 18], link.segment, address)


def resident(address: int, length: int) -> bool:
    """Whether every page is there."""
    pages = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data))
    assert libc.mincore(*arguments) == 0, ctypes.get_errno()
    return bool((pages & 1).all())


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_large_memory_is_there_and_registered_on_all_devices_at_once(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """A device's registration would fault pages in by one core, and one after the other would each take as long."""
    from mooncake_hpc.transports.rdma import regions

    large = regions.LARGE
    if kernel == "old":
        monkeypatch.setattr(regions, "MADV_POPULATE_WRITE", 12345)
    together, seen = threading.Barrier(4), []
    with engine("memory://large", "large:1", "a,b,c,d") as one, mmap.mmap(-1, large) as untouched:
        memory = np.frombuffer(untouched, np.uint8)

        def registering(device: str, address: int, length: int) -> None:
            together.wait(10)
            seen.append((device, length, resident(address, length)))

        assert not resident(int(memory.ctypes.data), large)
        fabric.registering = registering
        one.register(memory)
        assert sorted(seen) == [(device, large, True) for device in "abcd"]
        one.unregister(memory)
        del memory


def test_a_key_of_ours_that_the_device_refuses(fabric: Fabric) -> None:
    """It is tried again a few times, as the paths are not at fault, and then refused."""
    with pair("a", "b", rdma(retries=3)) as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        spare = link.here.allocate(4096)
        for key in [key for key, region in fabric.regions.items() if region.start == spare.ctypes.data]:
            del fabric.regions[key]
        with pytest.raises(AddressRejected):
            link.here.write(spare, link.segment, link.theirs.ctypes.data)
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)


def test_read_only_memory(fabric: Fabric) -> None:
    with pair("a", "b") as link:
        sealed = pattern(9, 5000).tobytes()
        link.there.register(sealed)
        address = link.there.open_segment("there:1").buffers[-1].address
        link.here.read(link.ours[:5000], link.segment, address)
        assert (link.ours[:5000] == pattern(9, 5000)).all()
        with pytest.raises(AddressRejected, match="writable"):
            link.here.write(link.ours[:5000], link.segment, address)


@pytest.mark.parametrize(("here", "there"), [("tcp", "rdma"), ("rdma", "tcp")])
def test_peers_of_another_protocol(fabric: Fabric, here: str, there: str) -> None:
    """Each side says what the other speaks."""

    def make(name: str, protocol: str) -> TransferEngine:
        return TransferEngine(name, "memory://protocols", protocol=protocol, bind_address="127.0.0.1", device_name="a")

    with make("there:1", there), make("here:1", here) as ours, pytest.raises(PeerLost, match=f"there:1.*{there}"):
        ours.open_segment("there:1")


@pytest.mark.slow
@pytest.mark.parametrize("there", ["rdma", "tcp", "auto"])
def test_auto_speaks_with_all(fabric: Fabric, there: str) -> None:
    store = "memory://auto"
    settings = rdma()
    with (
        TransferEngine("there:1", store, protocol=there, bind_address="127.0.0.1", device_name="b") as b,
        TransferEngine(
            "here:1", store, protocol="auto", bind_address="127.0.0.1", device_name="a", settings=settings
        ) as a,
    ):  # fmt: skip
        theirs, ours = np.zeros(100_000, np.uint8), a.allocate(100_000)
        b.register(theirs)
        ours[:] = pattern(11, 100_000)
        segment = a.open_segment("there:1")
        a.write(ours, segment, int(theirs.ctypes.data))
        assert (theirs == ours).all()
        assert segment.transport == {"rdma": "rdma", "tcp": "tcp", "auto": "shm+rdma+tcp"}[there]


@pytest.mark.slow
def test_a_peer_that_was_replaced(fabric: Fabric) -> None:
    store = "memory://replaced"
    with engine(store, "here:1", "a") as here:
        for number in range(3):
            with engine(store, "there:1", "b") as there:
                link = Pair(here, there)
                link.ours[:] = number
                here.write(link.ours, link.segment, link.theirs.ctypes.data)
                assert (link.theirs == number).all()
                here.unregister(link.ours)
            with pytest.raises(TransferError, match="there:1"):
                spare = here.allocate(64)
                here.write(spare, link.segment, link.segment.buffers[0].address)


def test_peers_whose_handshakes_tell_no_gid(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    """As originals before 0.3.11: it stands in their descriptors, for both roles."""
    from mooncake_hpc.wire.rdma_handshake import Hello

    told = Hello.to_json
    monkeypatch.setattr(Hello, "to_json", lambda self: told(replace(self, gid=b"", ready=None, mtu=0)))
    with pair("a,b", "c") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert {len(made.gid) for made in fabric.links} == {16}


@pytest.mark.slow
def test_more_peers_than_endpoints(fabric: Fabric) -> None:
    store = "memory://many"
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(engine(store, "here:1", "a", rdma(max_endpoints=2)))
        peers = [stack.enter_context(engine(store, f"peer{i}:1", "b")) for i in range(5)]
        links = [Pair(here, peer) for peer in peers]
        for turn in range(3):
            for link in links:
                link.ours[:] = turn + 1
                here.write(link.ours, link.segment, link.theirs.ctypes.data)
                assert (link.theirs == turn + 1).all()
        deadline = time.monotonic() + 10
        while len([pair for pair in list(fabric.pairs.values()) if pair.device == "a"]) > 4:  # their lanes end them
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.slow
def test_a_broken_connection_that_no_lane_uses_is_released(fabric: Fabric) -> None:
    """The accepting side of one, whose queue pairs nobody else looks at."""
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        accepted = [queue_pair for queue_pair in fabric.pairs.values() if queue_pair.device == "b"]
        transport: Any = link.there._transports[0]
        (endpoint,) = transport.pool._known[0]
        endpoint.to_error()
        deadline = time.monotonic() + 10
        while any(queue_pair in fabric.pairs.values() for queue_pair in accepted):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        link.ours[:] = pattern(3, SIZE)
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        assert (link.theirs == link.ours).all()


@pytest.mark.slow
def test_cancel_under_way(fabric: Fabric) -> None:
    """Nothing is touched afterwards, and the others' slices go on over new queue pairs."""
    with pair("a", "b") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        link.ours[:] = pattern(10, SIZE)
        fabric.held = True
        doomed = link.submit(link.request(WRITE, 0, 0, SIZE // 2))
        other = link.submit(link.request(WRITE, SIZE // 2, SIZE // 2, SIZE // 2))
        assert not other.join(0.1)
        canceller = threading.Thread(target=doomed.cancel)
        canceller.start()
        canceller.join(10)
        assert doomed.done and not canceller.is_alive()
        link.theirs[: SIZE // 2] = 55
        fabric.release()
        other.wait(10)
        assert (link.theirs[SIZE // 2 :] == link.ours[SIZE // 2 :]).all() and (link.theirs[: SIZE // 2] == 55).all()


def test_a_peer_that_does_not_answer_the_handshake(fabric: Fabric) -> None:
    """Nothing was sent: it is given back at the deadline, wherever it is in the queue; and the lane closes at once."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pair("a", "b") as link:
        link.segment._rpc_address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TransferTimeout, match=r"not done after 0\.3 s: cancelled \(no connection to there:1"):
            link.here.read(link.ours, link.segment, link.theirs.ctypes.data, timeout=0.3)
        assert time.monotonic() - began < 0.8
        batches = [link.submit(link.request(WRITE, 0, 0, SIZE)) for _ in range(3)]
        began = time.monotonic()
        batches[1].cancel()
        assert batches[1].done and not batches[0].done and time.monotonic() - began < 0.5
        link.here.close()
        assert batches[0].done and time.monotonic() - began < 1


def test_a_queue_behind_what_a_device_holds_back(fabric: Fabric) -> None:
    """What it was not given yet is given back at once; and what it has goes on."""
    with pair("a", "b", rdma(max_wr=4, queue_pairs=1)) as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        link.ours[:] = pattern(11, SIZE)
        fabric.held = True
        first = link.submit(link.request(WRITE, 0, 0, SIZE // 2))
        others = [link.submit(link.request(WRITE, SIZE // 2, SIZE // 2, SIZE // 2)) for _ in range(3)]
        assert not first.join(0.1)
        began = time.monotonic()
        others[1].cancel()
        assert others[1].done and time.monotonic() - began < 0.5
        fabric.release()
        for batch in (first, others[0], others[2]):
            batch.wait(10)
        assert (link.theirs == link.ours).all()


@pytest.mark.slow
def test_close_with_work_under_way(fabric: Fabric) -> None:
    with pair("a,b", "c,d") as link:
        link.here.write(link.ours, link.segment, link.theirs.ctypes.data)
        fabric.held = True
        batch = link.submit(link.request(WRITE, 0, 0, SIZE))
        began = time.monotonic()
        link.here.close()
        assert batch.join(1) and time.monotonic() - began < 5
