"""What a caller waits on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core import process
from mooncake_hpc.core.errors import (
    AddressRejected,
    AuthenticationError,
    PeerLost,
    PeerSilent,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from mooncake_hpc.core.request import WRITE
from mooncake_hpc.engine.arena import Arena, ArenaPool
from mooncake_hpc.transports import progress_kernels as leader
from mooncake_hpc.transports import queue_kernels as layout

if TYPE_CHECKING:
    from mooncake_hpc.native.xxh3 import Digest
    from mooncake_hpc.transports.queue import Lane

WORD, ERROR = layout.WORD // 8, layout.ERROR // 8
LOOK = 1_000_000  # ns between two looks at one request of a batch of several lanes
NATIVE_CALL = 50_000_000  # ns: no native call is longer, so that signals are served

_event_lock = process.lock()


class Batch:
    """A submitted set of requests. Its buffers belong to the engine until it is `done`.

    Made by `TransferEngine.submit`. Any number of threads may wait for it, of coroutines in any event loops await it,
    and of selectors watch its `fileno()`, all at the same time.
    """

    __slots__ = ("__weakref__", "_arena", "_event", "_held", "_lanes", "_pool", "_process", "_words")

    def __init__(self, arena: Arena, pool: ArenaPool, lanes: list[Lane], held: object) -> None:
        self._process = process.here
        self._arena = arena
        self._words = arena.words
        self._pool = pool
        self._lanes = lanes
        self._held = held  # slices and whatever else the lanes refer to
        self._event = -1

    def start(self, parts: list[tuple[Lane, int, int]], deadline: float) -> None:
        """Queue (lane, address of slices, their number) parts, for the engine. With the first refused (a full queue
        until `deadline`, time.monotonic(); a closed lane) raises its TransferError and nothing is queued."""
        process.check(self)
        self._words[layout.REMAINING // 8] = sum(count for _, _, count in parts)
        if not parts:
            self._words[layout.WORD // 8] = 1
        for number, (lane, slices, count) in enumerate(parts):
            try:
                lane.push(self, self._arena.address, slices, count, deadline)
            except TransferError:
                if number == 0:
                    raise
                layout.abandon(slices, count, self._arena.address, layout.LOST)
                continue
            self._lanes.append(lane)
            if number > 0:
                lane.hurry()

    # --- for the caller -------------------------------------------------------------------------------------

    def __len__(self) -> int:
        process.check(self)
        return self._arena.count

    @property
    def done(self) -> bool:
        """Whether every request has completed or failed. Moves bytes on the way, never waits."""
        process.check(self)
        if not self._finished():
            self._drive(time.monotonic_ns())
        return self._finished()

    @property
    def status(self) -> npt.NDArray[np.int8]:
        """A copy of the status of each request: 0 under way, 1 done, below 0 failed (as `TransferError` tells)."""
        process.check(self)
        return self._arena.status[: self._arena.count].copy()

    def wait(self, timeout: float | None = None) -> None:
        """Return once all requests are done.

        Raises the TransferError of the first that failed, once all have ended; TransferTimeout after `timeout`
        seconds (None: no limit beyond the transport's own), with the batch still running.
        """
        process.check(self)
        if not self.join(timeout):
            text = f"{self.describe()} is not done after {timeout:g} s; it goes on: wait again, or cancel() it"
            raise TransferTimeout(text + self.why_late())
        if self._words[ERROR]:
            self._raise_error()

    def join(self, timeout: float | None = None) -> bool:
        """As `wait`, but says whether the batch is done, and raises nothing."""
        if self._process is not process.here:
            process.refuse(self)
        words = self._words
        if words[WORD] & 1:
            return True
        now = time.monotonic_ns()
        end = None if timeout is None else now + int(timeout * 1e9)
        while end is None or now < end:
            until = now + NATIVE_CALL
            self._drive(until if end is None or until < end else end)
            if words[WORD] & 1:
                return True
            now = time.monotonic_ns()
        return False

    def join_request(self, number: int, timeout: float) -> int:
        """Wait `timeout` seconds at most for the request at `number` alone; its status, as in `status`."""
        process.check(self)
        status, end = self._arena.status, time.monotonic_ns() + int(timeout * 1e9)
        while not status[number] and (now := time.monotonic_ns()) < end:
            until = min(end, now + NATIVE_CALL)
            if len(self._lanes) == 1:
                self._lanes[0].drive_to(self._arena.address, number, until)
            else:
                self._drive(min(until, now + LOOK))
        return int(status[number])

    def digest(self, first: int, digest: Digest, timeout: float) -> int:
        """Wait `timeout` seconds at most for the requests from number `first` on, one after the other, and take the
        bytes of each into `digest` as soon as it is done: the number of the first that is not, or that failed."""
        process.check(self)
        end = time.monotonic_ns() + int(timeout * 1e9)
        while first < len(self) and (now := time.monotonic_ns()) < end:
            if len(self._lanes) == 1:
                until = min(end, now + NATIVE_CALL)
                first = self._lanes[0].digest(self._arena.address, first, len(self), digest.address, until)
            elif self.join_request(first, (end - now) / 1e9) > 0:
                record = self._arena.requests[first]
                digest.feed(int(record["local_addr"]), int(record["length"]))
                first += 1
            if first < len(self) and self._arena.status[first] < 0:
                break
        return first

    def cancel(self, timeout: float = 10.0) -> None:
        """Stop the batch; when this returns nothing touches its buffers any more.

        Batches of which nothing was sent fail with TransferCancelled at once; what is on the wire gets 0.2 s to end,
        after which its connection is cut. WRITEs that it took then need the peer's word that they cannot land any
        more, which is waited for 6 s: without it they fail with PeerLost. Raises TransferTimeout if even that does not
        end them.
        """
        process.check(self)
        self._words[layout.CANCEL // 8] = 1
        for lane in self._lanes:
            lane.drop_cancelled()
        if self.join(0.2):
            return
        for lane in self._lanes:
            lane.interrupt()
        if not self.join(timeout):
            raise TransferTimeout(f"{self.describe()} could not be cancelled within {timeout:g} s")

    def fileno(self) -> int:
        """A descriptor that becomes readable when the batch is done, and stays so, for select and event loops.

        It belongs to the batch, which closes it when it is deleted.
        """
        process.check(self)
        with _event_lock:
            if self._event < 0:
                self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._words[layout.EVENT // 8] = self._event
        for lane in self._lanes:
            lane.hurry()
        if self._words[layout.REMAINING // 8] == 0:  # whoever ends the batch may have looked for a descriptor before
            self.join()
            os.eventfd_write(self._event, 1)
        return self._event

    def __await__(self) -> Generator[Any, None, None]:
        process.check(self)
        yield from self._when_done().__await__()
        self._raise_error()

    async def _when_done(self) -> None:
        if self._finished():
            return
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        # of its own: a loop knows one reader a descriptor, and there may be other waiters, and the caller's reader
        fd = os.dup(self.fileno())
        try:
            loop.add_reader(fd, _wake, done)
            await done
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    def __del__(self) -> None:
        if self._event >= 0:
            with contextlib.suppress(OSError):
                os.close(self._event)
        self._pool.give(self._arena)

    # --- inside ---------------------------------------------------------------------------------------------

    def _finished(self) -> bool:
        return self._words[WORD] & 1 == 1

    def _drive(self, until: int) -> None:
        batch = self._arena.address
        for lane in self._lanes:
            if lane.drive(batch, until) != layout.EMPTY:
                return
        leader.await_batch(batch, until)

    def describe(self) -> str:
        """Its size and its peers, for messages."""
        process.check(self)
        where = ", ".join(sorted({lane.peer for lane in self._lanes})) or "nobody"
        return f"batch of {len(self)} requests with {where}"

    def why_late(self) -> str:
        """What its lanes wait for, for messages; "" where bytes move."""
        process.check(self)
        causes = dict.fromkeys(cause for lane in self._lanes if (cause := lane.why_late()))
        return f" ({'; '.join(causes)})" if causes else ""

    def _raise_error(self) -> None:
        error = self.error
        if error is not None:
            raise error

    @property
    def error(self) -> TransferError | None:
        """What the first failed request of a done batch failed of, or None."""
        process.check(self)
        code = self._words[ERROR]
        if code == 0:
            return None
        index = self._words[layout.ERROR_REQUEST // 8]
        request = self._arena.requests[index]
        verb = "WRITE to" if request["opcode"] == WRITE else "READ of"
        what = f"{verb} {int(request['remote_addr']):#x}+{int(request['length'])} (request {index}, {self.describe()})"
        cause = "; ".join(dict.fromkeys(lane.last_error for lane in self._lanes if lane.last_error))
        kind, text = _FAILURES[code]
        return kind(f"{what}: {text}" + (f" ({cause})" if cause and kind is not TransferCancelled else ""))


def _wake(done: asyncio.Future[None]) -> None:
    if not done.done():  # cancelled, or woken already
        done.set_result(None)


_FAILURES: dict[int, tuple[Callable[[str], TransferError], str]] = {
    layout.REJECTED: (AddressRejected, "the peer refused it: no single registered buffer holds that range"),
    layout.LOST: (PeerLost, "the peer is lost"),
    layout.TIMED_OUT: (TransferTimeout, "no progress"),
    layout.CANCELLED: (TransferCancelled, "cancelled"),
    layout.SILENT: (PeerSilent, "the peer does not answer: it is stopped, busy or cut off"),
    layout.STRANGER: (AuthenticationError, "the peer is not authenticated"),
    layout.MALFORMED: (PeerLost, "the peer does not speak this protocol"),
}
