"""Requests and batches: what a caller submits and what it waits on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mooncake_hpc.errors import (
    AddressRejected,
    PeerLost,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from mooncake_hpc.kernels import lane as layout

if TYPE_CHECKING:
    from mooncake_hpc.transports.lane import Lane

READ, WRITE = 0, 1  # the original's opcodes, as on its wire

REQUEST = np.dtype(
    {
        "names": ["opcode", "target_id", "local_addr", "remote_addr", "length"],
        "formats": ["u1", "i4", "u8", "u8", "u8"],
        "offsets": [0, 4, 8, 16, 24],
        "itemsize": 32,
    }
)
"""One request: `length` bytes between our `local_addr` and `remote_addr` in segment `target_id`."""

Requests = npt.NDArray[Any]

NATIVE_CALL = 50_000_000  # ns: no native call is longer, so that signals are served


class Batch:
    """A submitted set of requests. Its buffers belong to the engine until it is `done`.

    Made by `TransferEngine.submit`. Any thread may wait, several may.
    """

    def __init__(self, requests: Requests) -> None:
        self.requests = requests
        count = len(requests)
        self._block = np.zeros(layout.BATCH_WORDS + count + (count + 7) // 8, np.int64)
        self.address = int(self._block.ctypes.data)
        pending = self.address + 8 * layout.BATCH_WORDS
        self._status = self._block[layout.BATCH_WORDS + count :].view(np.int8)[:count]
        self._block[layout.EVENT // 8] = -1
        self._block[layout.STATUS // 8] = pending + 8 * count
        self._block[layout.PENDING // 8] = pending
        self._block[layout.BATCH_ONE // 8] = 1
        self._lanes: list[Lane] = []
        self._held: list[object] = []  # slices, and whatever else the lanes refer to
        self._event = -1
        self._event_lock = threading.Lock()

    # --- for the engine -------------------------------------------------------------------------------------

    def start(self, parts: list[tuple[Lane, int, int]], held: list[object], deadline: float) -> None:
        """Queue (lane, address of slices, their number) parts; with the first refused (a full queue until
        `deadline`, time.monotonic(); a closed lane) raises its TransferError and nothing is queued."""
        self._held = held
        self._block[layout.REMAINING // 8] = sum(count for _, _, count in parts)
        if not parts:
            self._block[layout.WORD // 8] = 1
        for number, (lane, slices, count) in enumerate(parts):
            try:
                lane.push(self, slices, count, deadline)
            except TransferError:
                if number == 0:
                    raise
                layout.abandon(slices, count, self.address, layout.LOST)
                continue
            self._lanes.append(lane)
            if number > 0:
                lane.hurry()

    @property
    def others(self) -> int:
        """Requests to other segments that the last `ranges.cut` left out."""
        return int(self._block[layout.OTHERS // 8])

    # --- for the caller -------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def done(self) -> bool:
        """Whether every request has completed or failed. Moves bytes on the way, never waits."""
        if not self._finished():
            self._drive(time.monotonic_ns())
        return self._finished()

    @property
    def status(self) -> npt.NDArray[np.int8]:
        """A copy of the status of each request: 0 under way, 1 done, below 0 failed (as `TransferError` tells)."""
        return self._status.copy()

    def wait(self, timeout: float | None = None) -> None:
        """Return once all requests are done.

        Raises the TransferError of the first that failed, once all have ended; TransferTimeout after `timeout`
        seconds (None: no limit beyond the transport's own), with the batch still running.
        """
        if not self.join(timeout):
            raise TransferTimeout(
                f"{self._describe()} is not done after {timeout} s; it goes on: wait again, or cancel() it"
            )
        self._raise_error()

    def join(self, timeout: float | None = None) -> bool:
        """As `wait`, but says whether the batch is done, and raises nothing."""
        end = None if timeout is None else time.monotonic_ns() + int(timeout * 1e9)
        while not self._finished():
            now = time.monotonic_ns()
            if end is not None and now >= end:
                return False
            slot = now + NATIVE_CALL
            self._drive(slot if end is None else min(slot, end))
        return True

    def cancel(self, timeout: float = 10.0) -> None:
        """Stop the batch; when this returns nothing touches its buffers any more.

        Requests not yet sent fail with TransferCancelled; those on the wire get a moment to end, after which
        their connection is cut. Raises TransferTimeout if even that does not end them.
        """
        self._block[layout.CANCEL // 8] = 1
        if self.join(0.2):
            return
        for lane in self._lanes:
            lane.interrupt()
        if not self.join(timeout):
            raise TransferTimeout(f"{self._describe()} could not be cancelled within {timeout} s")

    def fileno(self) -> int:
        """A descriptor that becomes readable when the batch is done, for select and event loops. Ours to close."""
        with self._event_lock:
            if self._event < 0:
                self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._block[layout.EVENT // 8] = self._event
        if self._finished():
            os.eventfd_write(self._event, 1)
        else:
            for lane in self._lanes:
                lane.hurry()
        return self._event

    def __await__(self) -> Generator[Any, None, None]:
        yield from self._when_done().__await__()
        self._raise_error()

    async def _when_done(self) -> None:
        if self._finished():
            return
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        fd = self.fileno()
        loop.add_reader(fd, done.set)
        try:
            await done.wait()
        finally:
            loop.remove_reader(fd)

    def __del__(self) -> None:
        if getattr(self, "_event", -1) >= 0:
            with contextlib.suppress(OSError):
                os.close(self._event)

    # --- inside ---------------------------------------------------------------------------------------------

    def _finished(self) -> bool:
        return bool(self._block[1] & 1)

    def _drive(self, until: int) -> None:
        for lane in self._lanes:
            if lane.drive(self.address, until) != layout.EMPTY:
                return
        layout.await_batch(self.address, until)

    def _describe(self) -> str:
        where = ", ".join(sorted({lane.peer for lane in self._lanes})) or "nobody"
        return f"batch of {len(self)} requests with {where}"

    def _raise_error(self) -> None:
        error = self.error
        if error is not None:
            raise error

    @property
    def error(self) -> TransferError | None:
        """What the first failed request of a done batch failed of, or None."""
        code = int(self._block[layout.ERROR // 8])
        if code == 0:
            return None
        index = int(self._block[layout.ERROR_REQUEST // 8])
        request = self.requests[index]
        verb = "WRITE to" if request["opcode"] == WRITE else "READ of"
        what = f"{verb} {int(request['remote_addr']):#x}+{int(request['length'])} (request {index}, {self._describe()})"
        cause = "; ".join(dict.fromkeys(lane.last_error for lane in self._lanes if lane.last_error))
        kind, text = _FAILURES[code]
        return kind(f"{what}: {text}" + (f" ({cause})" if cause and kind is not TransferCancelled else ""))


_FAILURES: dict[int, tuple[Callable[[str], TransferError], str]] = {
    layout.REJECTED: (AddressRejected, "the peer refused it: no single registered buffer holds that range"),
    layout.LOST: (PeerLost, "the peer is lost"),
    layout.TIMED_OUT: (TransferTimeout, "no progress"),
    layout.CANCELLED: (TransferCancelled, "cancelled"),
    layout.MALFORMED: (PeerLost, "the peer does not speak this protocol"),
}
