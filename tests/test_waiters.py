"""Any number of waiters of any kind on one batch: each wakes when it is done, and not before."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mooncake_hpc import REQUEST, Batch, TransferEngine
from mooncake_hpc.core.errors import PeerLost, TransferCancelled
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.embedded import find_etcd
from mooncake_hpc.testing.peer import PeerProcess

SIZE = 1 << 20
LIMIT = 30.0  # seconds

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]


class Pair:
    """An engine and a peer that stops and goes on."""

    def __init__(self, engine: TransferEngine, peer: PeerProcess) -> None:
        self.engine, self.peer = engine, peer
        self.block = np.zeros(SIZE, np.uint8)
        engine.register(self.block, remote_accessible=False)
        self.address = int(peer.call("allocate", SIZE, 1))
        self.segment = engine.open_segment(peer.name)
        engine.read(self.block, self.segment, self.address)

    def submit(self) -> Batch:
        row = (0, self.segment.id, self.block.ctypes.data, self.address, SIZE)
        return self.engine.submit(np.array([row], REQUEST))


@pytest.fixture(scope="module")
def peer() -> Iterator[PeerProcess]:
    with PeerProcess("P2PHANDSHAKE", "tcp") as process:
        yield process


@pytest.fixture
def pair(peer: PeerProcess, no_leaks: None) -> Iterator[Pair]:
    with TransferEngine("waiter:1", "P2PHANDSHAKE", protocol="tcp", bind_address="127.0.0.1") as engine:
        yield Pair(engine, peer)


def stopped(pair: Pair) -> Batch:
    """A batch that is not done before the peer goes on."""
    pair.peer.suspend()
    return pair.submit()


async def wait_for_it(batch: Batch) -> bool:
    await batch
    return batch.done


async def some(batch: Batch, go_on: threading.Event) -> list[object]:
    """Coroutines that await it, one of which is cancelled, one gives up, and one is shielded from that."""
    tasks = [asyncio.create_task(wait_for_it(batch)) for _ in range(3)]
    given_up = asyncio.create_task(asyncio.wait_for(wait_for_it(batch), 0.05))
    shielded = asyncio.create_task(wait_for_it(batch))
    leaving = asyncio.create_task(asyncio.wait_for(asyncio.shield(shielded), 0.05))
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(batch.fileno(), readable.set)  # the caller's own
    await asyncio.sleep(0.02)
    tasks[1].cancel()
    gone = await asyncio.gather(tasks[1], given_up, leaving, return_exceptions=True)
    assert [type(each) for each in gone] == [asyncio.CancelledError, TimeoutError, TimeoutError]
    assert not any(task.done() for task in (tasks[0], tasks[2], shielded)) and not readable.is_set()
    go_on.set()
    awake = await asyncio.wait_for(asyncio.gather(tasks[0], tasks[2], shielded, wait_for_it(batch)), LIMIT)
    await asyncio.wait_for(readable.wait(), LIMIT)
    asyncio.get_running_loop().remove_reader(batch.fileno())
    return [*awake]


def test_threads_loops_and_selectors_at_once(pair: Pair) -> None:
    batch, woken = stopped(pair), list[str]()
    ready = [threading.Event() for _ in range(2)]
    results: list[list[object]] = []

    def thread() -> None:
        batch.wait(LIMIT)
        woken.append("thread")

    def selector() -> None:
        if select.select([batch.fileno()], [], [], LIMIT)[0] and batch.done:
            woken.append("select")

    def poller() -> None:
        poll = select.poll()
        poll.register(batch.fileno(), select.POLLIN)
        if poll.poll(LIMIT * 1000) and batch.done:
            woken.append("poll")

    def loop(number: int) -> None:
        results.append(asyncio.run(some(batch, ready[number])))

    work = [thread, thread, selector, selector, poller, lambda: loop(0), lambda: loop(1)]
    threads = [threading.Thread(target=each) for each in work]
    for each in threads:
        each.start()
    try:
        for event in ready:
            assert event.wait(LIMIT)
        assert woken == [] and not batch.done
    finally:
        pair.peer.resume()
    for each in threads:
        each.join(LIMIT)
    assert sorted(woken) == ["poll", "select", "select", "thread", "thread"]
    assert results == [[True] * 4] * 2
    assert select.select([batch.fileno()], [], [], 0)[0], "it stays readable"


def test_waiting_is_no_work(pair: Pair) -> None:
    """Neither before the batch is done, nor while its descriptor is readable and others wait."""
    batch = stopped(pair)

    async def wait() -> None:
        waiters = [asyncio.create_task(wait_for_it(batch)) for _ in range(20)]
        await asyncio.sleep(0.05)
        begin = time.process_time()
        await asyncio.sleep(0.5)
        used = time.process_time() - begin
        pair.peer.resume()
        assert await asyncio.wait_for(asyncio.gather(*waiters), LIMIT) == [True] * 20
        assert used < 0.1

    try:
        asyncio.run(wait())
    finally:
        pair.peer.resume()


def test_no_descriptor_is_left(pair: Pair) -> None:
    async def one(number: int) -> None:
        batch = pair.submit()
        waiters = [asyncio.create_task(wait_for_it(batch)) for _ in range(4)]
        if number % 2:
            await asyncio.sleep(0)
            waiters[0].cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        await batch

    async def many() -> None:
        for number in range(100):
            await one(number)

    asyncio.run(many())
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(many())
    pair.submit().wait(LIMIT)  # the lane lets go of the last
    assert len(os.listdir("/proc/self/fd")) <= before


def test_every_waiter_is_told_of_a_failure(pair: Pair) -> None:
    batch = stopped(pair)

    async def wait() -> list[object]:
        waiters = [asyncio.create_task(wait_for_it(batch)) for _ in range(3)]
        await asyncio.sleep(0.02)
        await asyncio.to_thread(batch.cancel)
        return [*await asyncio.wait_for(asyncio.gather(*waiters, return_exceptions=True), LIMIT)]

    try:
        assert [type(each) for each in asyncio.run(wait())] == [TransferCancelled] * 3
    finally:
        pair.peer.resume()


def test_what_nobody_cancelled_is_lost(etcd: str) -> None:
    """The peer hangs, and its name is taken by another process."""
    with (
        TransferEngine("waiter:1", etcd, protocol="tcp", bind_address="127.0.0.1") as engine,
        PeerProcess(etcd, "tcp", "hung:1") as old,
    ):
        batch = stopped(Pair(engine, old))
        try:
            control = Path(find_etcd(Settings())).with_name("etcdctl"), f"--endpoints={etcd}"
            for key in ("mooncake/rpc_meta/hung:1", "mooncake/ram/hung:1"):  # as the end of its lease would
                subprocess.run([*control, "del", key], check=True, stdout=subprocess.DEVNULL)
            with PeerProcess(etcd, "tcp", "hung:1"):
                engine.open_segment("hung:1")
                with pytest.raises(PeerLost, match="the process of segment 'hung:1' was replaced"):
                    batch.wait(LIMIT)
        finally:
            old.resume()
