"""What every transport must do, between two processes. Subclass `TransportConformance` and set `protocol`."""

from __future__ import annotations

import asyncio
import contextlib
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mooncake_hpc import READ, REQUEST, WRITE, Segment, TransferEngine
from mooncake_hpc.errors import AddressRejected, PeerLost, TransferError, TransferTimeout
from mooncake_hpc.settings import Settings
from mooncake_hpc.testing.peer import Bytes, PeerProcess, digest, fill, pattern

HOST = "127.0.0.1"
MIXED = [1, 2, 3, 7, 63, 64, 65, 4095, 4096, 4097, 65_535, 65_537, 1 << 20, (1 << 22) + 13, 64 << 20]
SIZES = [1, 3, 8, 24, 4097, 65_536, 1_000_003, (16 << 20) + 1]


def requests(*records: tuple[int, int, int, int, int]) -> npt.NDArray[Any]:
    """An array of (opcode, target id, local address, remote address, length)."""
    return np.array(list(records), REQUEST)


def address(memory: Bytes) -> int:
    return int(memory.ctypes.data)


@dataclass(frozen=True)
class Link:
    """Our engine, a node in another process, and memory of the same size on both sides."""

    engine: TransferEngine
    peer: PeerProcess
    segment: Segment
    local: Bytes
    remote: int  # address

    def request(self, opcode: int, ours: int, theirs: int, length: int) -> tuple[int, int, int, int, int]:
        """A record with offsets into the memories."""
        return opcode, self.segment.id, address(self.local) + ours, self.remote + theirs, length

    def run(self, *records: tuple[int, int, int, int, int], timeout: float = 30.0) -> None:
        self.engine.submit(requests(*records)).wait(timeout)

    def hammer(self, memory: Bytes, write: bool) -> None:
        """Have the peer transfer all of our `memory` over and over; returns once it does."""
        self.peer.call("hammer", self.engine.name, address(memory), memory.size, write)
        deadline = time.monotonic() + 20
        while self.peer.call("hammered") < 2:
            assert time.monotonic() < deadline, self.peer.call("stop_hammer")
            time.sleep(0.005)

    def remote_digest(self, offset: int = 0, length: int | None = None) -> str:
        return str(self.peer.call("digest", self.remote, offset, length))


@contextlib.contextmanager
def linked(
    protocol: str,
    nbytes: int,
    metadata: str = "P2PHANDSHAKE",
    settings: Settings | None = None,
    peer_env: Mapping[str, str] | None = None,
) -> Iterator[Link]:
    """A fresh pair of processes."""
    with (
        PeerProcess(metadata, protocol, env=peer_env) as peer,
        TransferEngine("ours:1", metadata, protocol=protocol, bind_address=HOST, settings=settings) as engine,
    ):
        local, remote = engine.allocate(nbytes), peer.call("allocate", nbytes)
        yield Link(engine, peer, engine.open_segment(peer.name), local, remote)


class TransportConformance:
    """Bytes are compared in every test. The tests of a class share one pair of processes, but for the fatal ones."""

    protocol: str
    private = True  # whether it reaches memory of the caller's own, or only such as lies in memory files
    settings: Settings | None = None
    peer_env: Mapping[str, str] | None = None  # the peer's environment; None: this process's
    arena = 160 << 20  # bytes that the tests of a class share on each side
    mixed: Sequence[int] = MIXED  # lengths of a batch; twice their sum and more fits the arena
    large = (2 << 30) + 4097  # bytes of one request beyond every limit on the way
    soon = 10.0  # seconds within which a peer's death is noticed

    @pytest.fixture(scope="class")
    @classmethod
    def link(cls) -> Iterator[Link]:
        with linked(cls.protocol, cls.arena, settings=cls.settings, peer_env=cls.peer_env) as link:
            yield link

    def fresh(self, nbytes: int) -> AbstractContextManager[Link]:
        """A pair of processes for one test."""
        return linked(self.protocol, nbytes, settings=self.settings, peer_env=self.peer_env)

    def another(self) -> PeerProcess:
        return PeerProcess("P2PHANDSHAKE", self.protocol, env=self.peer_env)

    def register(self, link: Link, nbytes: int, seed: int, readonly: bool = False) -> int:
        """The address of memory that the peer registers, neither for the whole of a memory file nor by allocate()."""
        return int(link.peer.call("register", nbytes, seed, readonly, self.private))

    # --- reads, writes and their sizes ----------------------------------------------------------------------

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_read(self, link: Link, nbytes: int) -> None:
        link.peer.call("fill", link.remote, nbytes, nbytes + 100)
        link.local[: nbytes + 24] = 0
        link.engine.read(link.local[13 : 13 + nbytes], link.segment, link.remote + 5)
        assert digest(link.local[13 : 13 + nbytes]) == digest(pattern(nbytes, nbytes + 100)[5 : 5 + nbytes])
        assert not link.local[:13].any() and not link.local[13 + nbytes : nbytes + 24].any()

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_write(self, link: Link, nbytes: int) -> None:
        around = nbytes + (1 << 16)
        link.peer.call("fill", link.remote, 1, around)
        expected = pattern(1, around)
        expected[7 : 7 + nbytes] = link.local[3 : 3 + nbytes] = pattern(nbytes + 1, nbytes)
        link.engine.write(link.local[3 : 3 + nbytes], link.segment, link.remote + 7)
        assert link.remote_digest(0, around) == digest(expected)

    def test_batch_of_mixed_sizes_both_ways(self, link: Link) -> None:
        """Reads into the upper half while writes go to the peer's, unaligned and in random order."""
        half = self.arena // 2
        link.peer.call("fill", link.remote, 2)
        link.local[:] = pattern(3, self.arena)
        theirs, ours = pattern(2, self.arena), pattern(3, self.arena)
        records, at = [], 1
        for length in np.random.default_rng(4).permutation(self.mixed).tolist():
            records += [link.request(READ, half + at, at, length), link.request(WRITE, at, half + at, length)]
            at += length + 3
        batch = link.engine.submit(requests(*records))
        batch.wait(60)
        for opcode, _, local, remote, length in records:
            mine, its = local - address(link.local), remote - link.remote
            if opcode == READ:
                ours[mine : mine + length] = theirs[its : its + length]
            else:
                theirs[its : its + length] = ours[mine : mine + length]
        assert (batch.status == 1).all()
        assert (link.local == ours).all()
        assert link.remote_digest() == digest(theirs)

    def test_zero_length(self, link: Link) -> None:
        link.local[:64] = pattern(5, 64)
        batch = link.engine.submit(
            requests(link.request(READ, 0, 0, 0), link.request(WRITE, self.arena, self.arena, 0))
        )
        batch.wait(5)
        assert batch.done and batch.status.tolist() == [1, 1]
        link.run(link.request(WRITE, 0, 0, 0), link.request(WRITE, 0, 11, 64), link.request(READ, 0, 0, 0))
        assert link.remote_digest(11, 64) == digest(pattern(5, 64))
        empty = link.engine.submit(requests())
        empty.wait(0)
        assert empty.done and len(empty) == 0

    @pytest.mark.slow
    def test_one_request_above_2_gib(self) -> None:
        nbytes = self.large
        with self.fresh(nbytes) as link:
            fill(link.local, 6)
            sent = digest(link.local)
            link.run(link.request(WRITE, 0, 0, nbytes), timeout=60)
            assert link.remote_digest() == sent
            link.local[:] = 0
            link.run(link.request(READ, 0, 0, nbytes), timeout=60)
            assert digest(link.local) == sent

    # --- registrations --------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "cuts",
        [
            [(0, 60_000), (10_000, 100_000), (20_000, 30_000)],
            [(0, 5_000), (5_000, 5_001), (5_001, 100_000)],
            [(0, 100_000), (0, 50_000), (0, 100_000)],
        ],
        ids=["overlapping", "adjacent", "twice"],
    )
    def test_request_across_buffers(self, link: Link, cuts: Sequence[tuple[int, int]]) -> None:
        remote = link.peer.call("register_parts", 100_000, cuts, self.private)
        data = pattern(8, 99_998)
        link.local[:99_998] = data
        base, target = address(link.local), link.segment.id
        link.run((WRITE, target, base, remote + 1, 99_998))
        assert link.peer.call("digest", remote, 1, 99_998) == digest(data)
        link.run((READ, target, base + 200_000, remote + 1, 99_998))
        assert (link.local[200_000:299_998] == data).all()

    def test_hole_between_buffers(self, link: Link) -> None:
        remote = link.peer.call("register_parts", 9_000, [(0, 4_000), (4_001, 9_000)], self.private)
        with pytest.raises(AddressRejected, match=link.peer.name):
            link.run((READ, link.segment.id, address(link.local), remote, 9_000))

    def test_addresses_of_nobody(self, link: Link) -> None:
        ours, target = address(link.local), link.segment.id
        bad = [
            (READ, target, ours, link.remote - 4096, 1 << 20),
            (WRITE, target, ours, link.remote + self.arena - 10, 1 << 20),
            (READ, target, ours, 8, 1),
            (WRITE, target, ours, (1 << 63) - 5, 10),
            (READ, target, ours, (1 << 64) - 5, 10),
            (READ, target, ours + self.arena, link.remote, 1),
            (WRITE, target, ours - 1, link.remote, 2),
        ]
        link.local[:100] = 1
        before = link.remote_digest(0, 100)
        for record in bad:
            with pytest.raises(AddressRejected, match="request 1 .*" + link.peer.name):
                link.run(link.request(WRITE, 0, 0, 100), record)
        assert link.remote_digest(0, 100) == before  # nothing of a refused batch starts

    def test_readonly_memory(self, link: Link) -> None:
        remote = self.register(link, 5_000, 9, readonly=True)
        ours = link.local[:5_000]
        link.engine.read(ours, link.segment, remote)
        assert (ours == pattern(9, 5_000)).all()
        ours[:] = 0
        with pytest.raises(AddressRejected, match="writable"):
            link.engine.write(ours, link.segment, remote)
        assert link.peer.call("digest", remote) == digest(pattern(9, 5_000))
        sealed = pattern(10, 5_000).tobytes()
        link.engine.register(sealed)
        link.engine.write(sealed, link.segment, link.remote)
        assert link.remote_digest(0, 5_000) == digest(pattern(10, 5_000))
        with pytest.raises(AddressRejected, match="writable"):
            link.engine.read(sealed, link.segment, link.remote)
        link.engine.unregister(sealed)
        with pytest.raises(AddressRejected, match="registered here"):
            link.engine.write(sealed, link.segment, link.remote)

    def test_memory_not_for_others(self, link: Link) -> None:
        remote = link.peer.call("allocate", 4_096, 0, False)
        with pytest.raises(AddressRejected):
            link.run((READ, link.segment.id, address(link.local), remote, 1))
        own = link.engine.allocate(4_096, remote_accessible=False)
        link.peer.call("fill", link.remote, 11)
        link.engine.read(own, link.segment, link.remote)
        assert (own == pattern(11, self.arena)[:4_096]).all()

    def test_registered_after_we_opened(self, link: Link) -> None:
        for remote in (self.register(link, 70_000, 12), link.peer.call("allocate", 70_000, 12)):
            ours = link.local[:70_000]
            ours[:] = 0
            link.engine.read(ours, link.segment, remote)
            assert (ours == pattern(12, 70_000)).all()
            link.peer.call("drop", remote)

    def test_unregistered_after_we_opened(self, link: Link) -> None:
        for remote in (self.register(link, 70_000, 13), link.peer.call("allocate", 70_000, 13)):
            link.engine.read(link.local[:70_000], link.segment, remote)
            link.peer.call("unregister", remote)
            link.local[:70_000] = 0
            with pytest.raises(AddressRejected, match=link.peer.name):
                link.engine.write(link.local[:70_000], link.segment, remote)
            assert link.peer.call("digest", remote) == digest(pattern(13, 70_000))
            link.run(link.request(WRITE, 0, 0, 1000))  # the path itself still works

    @pytest.mark.parametrize("allocated", [True, False])
    @pytest.mark.parametrize("write", [True, False])
    def test_unregister_while_the_peer_transfers(self, link: Link, write: bool, allocated: bool) -> None:
        """What goes on in memory is over when unregister() returns, and other memory's transfers go on."""
        nbytes = 8 << 20
        if allocated:
            memory = link.engine.allocate(nbytes)
        else:
            private = np.zeros(nbytes, np.uint8)
            memory = private if self.private else link.engine.allocate(nbytes, remote_accessible=False)[:]
            link.engine.register(memory)
        memory[:] = 1
        link.hammer(memory, write)
        began = time.monotonic()
        link.engine.unregister(memory)
        took = time.monotonic() - began
        memory[:] = 77
        time.sleep(0.2)
        assert (memory == 77).all()
        assert took < 5
        batches, error = link.peer.call("stop_hammer")
        assert batches > 0 and error.startswith("AddressRejected")

    def test_other_memory_goes_on_while_some_is_unregistered(self, link: Link) -> None:
        busy = link.engine.allocate(4 << 20)
        link.hammer(busy, write=True)
        slowest = 0.0
        for _ in range(20):
            other = link.engine.allocate(4_096)
            began = time.monotonic()
            link.engine.unregister(other)
            slowest = max(slowest, time.monotonic() - began)
        batches, error = link.peer.call("stop_hammer")
        link.engine.unregister(busy)
        assert batches > 0 and error == "" and slowest < 5

    # --- batches --------------------------------------------------------------------------------------------

    def test_many_requests_in_a_batch(self, link: Link) -> None:
        count, size = 10_000, 500
        link.peer.call("fill", link.remote, 14)
        order = np.random.default_rng(15).permutation(count)
        records = np.zeros(count, REQUEST)
        records["target_id"] = link.segment.id
        records["local_addr"] = address(link.local) + size * np.arange(count)
        records["remote_addr"] = link.remote + size * order
        records["length"] = size
        batch = link.engine.submit(records)
        records[:] = 0  # ours again
        batch.wait(30)
        expected = pattern(14, self.arena)[: count * size].reshape(count, size)[order]
        assert (link.local[: count * size].reshape(count, size) == expected).all()
        assert (batch.status == 1).all() and len(batch) == count

    def test_more_batches_than_the_queue_holds(self, link: Link) -> None:
        """Those beyond wait in submit(), which fails only at its deadline."""
        link.local[:] = pattern(16, self.arena)
        pieces = [(1024 * i, 1024 - i % 7) for i in range(5_000)]
        batches = [link.engine.submit(requests(link.request(WRITE, at, at, size))) for at, size in pieces]
        for batch in reversed(batches):
            batch.wait(30)
        link.run(link.request(READ, self.arena // 2, 0, 5_000 * 1024))
        theirs = link.local[self.arena // 2 :]
        assert all((theirs[at : at + size] == link.local[at : at + size]).all() for at, size in pieces)

    def test_batches_that_nobody_waits_on(self, link: Link) -> None:
        link.local[:1000] = pattern(17, 1000)
        batch = link.engine.submit(requests(link.request(WRITE, 0, 2000, 1000)))
        deadline = time.monotonic() + 10
        while not (batch.status == 1).all():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert link.remote_digest(2000, 1000) == digest(pattern(17, 1000))

    def test_twelve_threads(self, link: Link) -> None:
        share, rounds = 1 << 20, 20
        link.peer.call("fill", link.remote, 18)
        failures: list[BaseException] = []

        def work(thread: int) -> None:
            at, back = thread * share, self.arena // 2 + thread * share
            try:
                for step in range(rounds):
                    size = share - step - 100
                    link.local[at : at + size] = step + thread
                    link.run(*[link.request(WRITE, at + i, at + i, size // 16 + 1) for i in range(0, size, size // 16)])
                    link.run(link.request(READ, back, at, size))
                    assert (link.local[back : back + size] == step + thread).all()
            except BaseException as error:
                failures.append(error)

        run_threads([lambda n=n: work(n) for n in range(12)])  # type: ignore[misc]
        assert not failures, failures[0]

    def test_several_wait_on_one_batch(self, link: Link) -> None:
        link.local[: 32 << 20] = pattern(19, 32 << 20)
        batch = link.engine.submit(requests(*[link.request(WRITE, i << 20, i << 20, 1 << 20) for i in range(32)]))
        done: list[bool] = []
        run_threads([lambda: done.append(batch.join(20))] * 5)
        assert done == [True] * 5
        assert link.remote_digest(0, 32 << 20) == digest(link.local[: 32 << 20])

    def test_wait_that_times_out_leaves_the_batch_running(self, link: Link) -> None:
        link.local[:] = pattern(20, self.arena)
        batch = link.engine.submit(requests(*[link.request(WRITE, 0, 0, self.arena)] * 8))
        with pytest.raises(TransferTimeout, match="goes on"):
            batch.wait(0.001)
        assert (batch.status == 0).any()
        batch.wait(60)
        assert (batch.status == 1).all()
        assert link.remote_digest() == digest(link.local)

    @pytest.mark.parametrize("opcode", [READ, WRITE])
    def test_cancel(self, link: Link, opcode: int) -> None:
        """When it returns, nothing touches the buffers, and the requests have ended one way or the other."""
        link.peer.call("fill", link.remote, 21)
        batch = link.engine.submit(requests(*[link.request(opcode, 0, 0, self.arena)] * 50))
        batch.cancel()
        assert batch.done and (batch.status != 0).all()
        assert (batch.status < 0).any()
        link.local[:] = 33
        link.peer.call("fill", link.remote, 22)
        time.sleep(0.2)
        assert (link.local == 33).all()
        assert link.remote_digest() == digest(pattern(22, self.arena))
        with pytest.raises(TransferError, match="cancelled"):
            batch.wait(1)
        batch.cancel()
        link.run(link.request(READ, 0, 0, self.arena))
        assert digest(link.local) == digest(pattern(22, self.arena))

    def test_cancel_leaves_other_batches_alone(self, link: Link) -> None:
        link.local[:] = pattern(23, self.arena)
        doomed = link.engine.submit(
            requests(*[link.request(READ, self.arena // 2, self.arena // 2, self.arena // 2)] * 20)
        )
        kept = link.engine.submit(requests(link.request(WRITE, 0, 0, 1 << 20)))
        doomed.cancel()
        kept.wait(20)
        assert link.remote_digest(0, 1 << 20) == digest(link.local[: 1 << 20])

    def test_fileno(self, link: Link) -> None:
        link.local[:] = pattern(24, self.arena)
        early = link.engine.submit(requests(*[link.request(WRITE, 0, 0, self.arena)] * 2))
        assert select.select([early], [], [], 30)[0] == [early]
        assert early.done and early.fileno() == early.fileno()
        assert link.remote_digest() == digest(link.local)
        assert select.select([early], [], [], 0)[0] == [early]

    def test_await(self, link: Link) -> None:
        link.local[:] = pattern(25, self.arena)

        async def transfer(at: int) -> None:
            await link.engine.submit(requests(link.request(WRITE, at, at, 1 << 20)))

        async def main() -> None:
            await asyncio.gather(*[transfer(i << 20) for i in range(40)])

        asyncio.run(main())
        assert link.remote_digest(0, 40 << 20) == digest(link.local[: 40 << 20])

    def test_lane_bytes(self, link: Link) -> None:
        before = sum(link.engine.lane_bytes().values())
        link.run(link.request(READ, 0, 0, 123_457), link.request(WRITE, 200_000, 0, 1_003), link.request(READ, 0, 0, 0))
        after = link.engine.lane_bytes()
        assert sum(after.values()) - before == 123_457 + 1_003
        assert all(name.startswith(f"{self.protocol}/{link.peer.name}") for name in after)

    # --- several peers, and their end -----------------------------------------------------------------------

    def test_one_batch_to_two_peers(self, link: Link) -> None:
        with self.another() as second:
            remote = second.call("allocate", 1 << 20)
            target = link.engine.open_segment(second.name).id
            assert target != link.segment.id
            link.local[: 2 << 20] = pattern(26, 2 << 20)
            base = address(link.local)
            records = [
                record
                for at in range(0, 1 << 20, 1 << 16)
                for record in (
                    link.request(WRITE, at, at, 1 << 16),
                    (WRITE, target, base + (1 << 20) + at, remote + at, 1 << 16),
                )
            ]
            link.run(*records)
            assert link.remote_digest(0, 1 << 20) == digest(link.local[: 1 << 20])
            assert second.call("digest", remote) == digest(link.local[1 << 20 : 2 << 20])

    def test_killed_peer(self) -> None:
        """Whoever transfers hears of it soon, other peers' transfers go on."""
        with self.fresh(8 << 20) as link, self.another() as other:
            remote = other.call("allocate", 4_096)
            healthy = link.engine.open_segment(other.name)
            threading.Timer(0.2, link.peer.process.kill).start()
            deadline = time.monotonic() + self.soon
            with pytest.raises(PeerLost, match=link.peer.name):
                while time.monotonic() < deadline:
                    link.run(*[link.request(WRITE, 0, 0, 8 << 20)] * 4)
            assert time.monotonic() < deadline
            link.local[:4_096] = pattern(27, 4_096)
            link.engine.write(link.local[:4_096], healthy, remote)
            assert other.call("digest", remote) == digest(pattern(27, 4_096))

    # --- messages -------------------------------------------------------------------------------------------

    def test_notifications(self, link: Link) -> None:
        texts = [("shard", f"{i} Zürich") for i in range(20)]
        for name, text in texts:
            link.engine.notify(link.segment, name, text)
        assert link.peer.call("notifications") == [list(pair) for pair in texts]
        assert link.peer.call("notifications") == []
        link.peer.call("notify", link.engine.name, "back", "text")
        assert link.engine.notifications() == [("back", "text")]

    def test_probe(self, link: Link) -> None:
        assert link.engine.probe(link.peer.name)
        assert not link.engine.probe(f"{HOST}:1")


def run_threads(calls: Sequence[Callable[[], object]], timeout: float = 60.0) -> None:
    """Run all at once and wait for their end."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a thread is stuck"
