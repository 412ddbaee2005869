"""What every transport must do, between two processes. Subclass `TransportConformance` and set `protocol`."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from mooncake_hpc import READ, WRITE
from mooncake_hpc.core.errors import AddressRejected, PeerLost
from mooncake_hpc.testing.batches import BatchConformance
from mooncake_hpc.testing.link import HOST, Link, address, requests
from mooncake_hpc.testing.peer import digest, fill, pattern

MIXED = [1, 2, 3, 7, 63, 64, 65, 4095, 4096, 4097, 65_535, 65_537, 1 << 20, (1 << 22) + 13, 64 << 20]
SIZES = [1, 3, 8, 24, 4097, 65_536, 1_000_003, (16 << 20) + 1]


class TransportConformance(BatchConformance):
    """Bytes are compared in every test."""

    mixed: Sequence[int] = MIXED  # lengths of a batch; twice their sum and more fits the arena
    large = (2 << 30) + 4097  # bytes of one request beyond every limit on the way
    soon = 10.0  # seconds within which a peer's death is noticed

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

    @pytest.mark.slow
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
            (READ, target, ours, (1 << 64) - 4096, 64),
            (WRITE, target, ours, (1 << 64) - 4096, 64),
            (WRITE, target, ours, 1 << 63, 64),
            (WRITE, target, (1 << 64) - 4096, link.remote, 64),
            (READ, target, (1 << 63) + (ours & 0xFFFF), link.remote, 64),
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

    def test_memory_that_peers_may_only_read(self, link: Link) -> None:
        remote = link.peer.call("allocate", 5_000, 12, True, False)
        ours = link.local[:5_000]
        link.engine.read(ours, link.segment, remote)
        assert (ours == pattern(12, 5_000)).all()
        ours[:] = 0
        with pytest.raises(AddressRejected, match="writable"):
            link.engine.write(ours, link.segment, remote)
        assert link.peer.call("digest", remote) == digest(pattern(12, 5_000))
        link.peer.call("fill", remote, 13)  # its owner may
        link.engine.read(ours, link.segment, remote)
        assert (ours == pattern(13, 5_000)).all()
        link.peer.call("drop", remote)

    def test_an_address_of_more_than_64_bits(self, link: Link) -> None:
        for remote in (1 << 64, -4096, (1 << 200) + link.remote):
            with pytest.raises(AddressRejected, match=link.peer.name):
                link.engine.write(link.local[:64], link.segment, remote)

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

    @pytest.mark.slow
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
