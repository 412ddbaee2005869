"""What batches must do over every transport."""

from __future__ import annotations

import asyncio
import random
import select
import signal
import time

import numpy as np
import pytest
from xxhash import xxh3_128

from mooncake_hpc import READ, REQUEST, WRITE
from mooncake_hpc.core.errors import AddressRejected, ConfigError, TransferError, TransferTimeout
from mooncake_hpc.native.xxh3 import Digest
from mooncake_hpc.testing.link import Link, Linked, address, requests, run_threads
from mooncake_hpc.testing.peer import digest, pattern


class BatchConformance(Linked):
    """Many requests, many batches, many who wait, and those who do not any more."""

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

    def test_transfer_that_times_out_gives_the_memory_back(self, link: Link) -> None:
        link.peer.call("fill", link.remote, 21)
        with pytest.raises(TransferTimeout) as caught:
            link.engine.transfer(requests(*[link.request(READ, 0, 0, self.arena)] * 20), timeout=0.002)
        assert 1 <= caught.value.failed <= 20
        link.local[:] = 33
        time.sleep(0.2)
        assert (link.local == 33).all()

    def test_requests_waited_for_one_by_one(self, link: Link) -> None:
        """What one reads is there once it is done, whatever becomes of those after it."""
        link.peer.call("fill", link.remote, 28)
        expected, size = pattern(28, self.arena), self.arena // 40
        link.local[:] = 0
        batch = link.engine.submit(requests(*[link.request(READ, at, at, size) for at in range(0, 40 * size, size)]))
        for number in range(40):
            while not (status := batch.join_request(number, 10)):
                pass
            assert status == 1
            part = slice(number * size, (number + 1) * size)
            assert (link.local[part] == expected[part]).all()
        batch.wait(10)
        many = link.engine.submit(requests(*[link.request(READ, 0, 0, self.arena)] * 20))
        assert many.join_request(19, 0.001) == 0
        many.cancel()
        assert many.join_request(19, 10) < 0

    def test_digest_of_requests(self, link: Link) -> None:
        """Of the bytes as they come; it ends at what fails, and at the time-out."""
        link.peer.call("fill", link.remote, 29)
        size = self.arena // 40
        link.local[:] = 0
        batch = link.engine.submit(requests(*[link.request(READ, at, at, size) for at in range(0, 40 * size, size)]))
        taken, come = Digest(40 * size), 0
        while come < 40:
            assert batch.join_request(come, 0) >= 0
            come = batch.digest(come, taken, 10)
        assert taken.digest() == xxh3_128(pattern(29, self.arena)[: 40 * size].data).digest()
        many = link.engine.submit(requests(*[link.request(READ, 0, 0, self.arena)] * 20))
        taken = Digest(20 * self.arena)
        assert many.digest(0, taken, 0.001) < 20
        many.cancel()
        assert many.digest(19, taken, 10) == 19
        assert many.join_request(19, 0) < 0

    def test_repeat(self, link: Link) -> None:
        link.local[:] = pattern(27, self.arena)
        records = requests(link.request(WRITE, 0, 0, 1 << 20), link.request(WRITE, 1 << 20, 1 << 20, 1 << 20))
        before, latencies = sum(link.engine.lane_bytes().values()), np.zeros(30, np.int64)
        began = time.monotonic_ns()
        assert link.engine.repeat(records, latencies, 60) == 30
        assert (latencies > 0).all() and latencies.sum() <= time.monotonic_ns() - began
        assert sum(link.engine.lane_bytes().values()) == before + 30 * (2 << 20)
        assert link.remote_digest(0, 2 << 20) == digest(link.local[: 2 << 20])
        latencies[:] = 0
        assert link.engine.repeat(records, latencies, 0) == 1
        assert latencies[0] > 0 and not latencies[1:].any()
        with pytest.raises(ConfigError, match="latencies"):
            link.engine.repeat(records, np.zeros(3, np.int32), 1)
        with pytest.raises(AddressRejected):
            link.engine.repeat(requests(link.request(WRITE, 0, self.arena, 4096)), latencies, 1)

    def test_repeat_times_requests_of_some_batches(self, link: Link) -> None:
        records = requests(link.request(WRITE, 0, 0, 4096), link.request(READ, 0, 4096, 1 << 20))
        for limit, expected in (30, [1, 9, 17, 25]), (3, [0, 1, 2]), (1, [0]), (6, [1, 3, 5]):
            latencies, rows = np.zeros(limit, np.int64), np.full((4, 2), -1, np.int64)
            assert link.engine.repeat(records, latencies, 60, None, rows) == limit
            timed = rows[: len(expected)]
            assert (timed > 0).all() and (timed.max(axis=1) <= latencies[expected]).all()
            assert (rows[len(expected) :] == -1).all()
        for wrong in np.zeros((4, 3), np.int64), np.zeros(2, np.int64), np.zeros((0, 2), np.int64):
            with pytest.raises(ConfigError, match="rows of 2"):
                link.engine.repeat(records, latencies, 60, None, wrong)

    def test_batches_longer_than_a_native_call_are_repeated(self, link: Link) -> None:
        many = [link.request(READ, 0, 0, self.arena)] * 6
        latencies, rows = np.zeros(2, np.int64), np.zeros((1, 6), np.int64)
        assert link.engine.repeat(requests(*many), latencies, 60, None, rows) == 2
        assert (latencies > 0).all()
        assert (rows > 0).all() and rows.max() <= latencies[1]

    def test_repeat_that_times_out_gives_the_memory_back(self, link: Link) -> None:
        link.peer.call("fill", link.remote, 21)
        latencies, rows = np.zeros(5, np.int64), np.zeros((5, 20), np.int64)
        many = requests(*[link.request(READ, 0, 0, self.arena)] * 20)
        with pytest.raises(TransferTimeout):
            link.engine.repeat(many, latencies, 60, 0.002, rows)
        assert not latencies.any() and not rows.any()
        link.local[:] = 33
        time.sleep(0.2)
        assert (link.local == 33).all()

    @pytest.mark.parametrize(("length", "times"), [(8, 1), (1 << 20, 1), (8, 50)])
    def test_transfers_interrupted_at_random_points(self, link: Link, length: int, times: int) -> None:
        """As by Ctrl-C: the memory is the caller's again, the queue goes on, and the next transfer moves its bytes."""

        alarms = 0

        def interrupt(*_: object) -> None:
            nonlocal alarms
            alarms += 1
            raise KeyboardInterrupt

        def transfer_until_then(round: int) -> None:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 2e-4))
            while alarms == round:
                if times == 1:
                    link.engine.transfer(requests(link.request(READ, 0, 0, length)))
                else:
                    link.engine.repeat(requests(link.request(READ, 0, 0, length)), latencies, 1)

        chance, interrupted, latencies = random.Random(26), 0, np.zeros(times, np.int64)
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for round in range(200):
                try:
                    transfer_until_then(round)  # a function: Python 3.13 leaves the jumps of a loop out of its `try`
                except KeyboardInterrupt:
                    interrupted += 1
                link.local[:length] = round
                link.run(link.request(WRITE, 0, self.arena // 2, length))
                assert (link.local[:length] == round).all()
        finally:
            signal.signal(signal.SIGALRM, before)
        assert alarms == 200 and interrupted > 150  # an exception in a destructor is not passed on
        assert link.remote_digest(self.arena // 2, length) == digest(link.local[:length])

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

    def test_times_of_requests(self, link: Link) -> None:
        lengths = [1, 0, 4096, 3 << 20, 65_537]
        done_at = np.zeros(len(lengths), np.int64)
        records = requests(*[link.request(WRITE, 0, 0, length) for length in lengths])
        began = time.monotonic_ns()
        batch = link.engine.submit(records, done_at=done_at)
        batch.wait(20)
        assert (began <= done_at).all() and (done_at <= time.monotonic_ns()).all()
        with pytest.raises(ConfigError, match="5 int64"):
            link.engine.submit(records, done_at=done_at[:4])
        first = done_at.copy()
        link.engine.submit(records).wait(20)
        assert (done_at == first).all()

    def test_lane_bytes(self, link: Link) -> None:
        before = sum(link.engine.lane_bytes().values())
        link.run(link.request(READ, 0, 0, 123_457), link.request(WRITE, 200_000, 0, 1_003), link.request(READ, 0, 0, 0))
        after = link.engine.lane_bytes()
        assert sum(after.values()) - before == 123_457 + 1_003
        assert all(name.startswith(f"{self.protocol}/{link.peer.name}") for name in after)
