"""Python's half of a lane: its state block, its producers, its thread, and what repairs it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.address import is_silent
from mooncake_hpc.core.errors import AuthenticationError, PeerLost, PeerSilent, TransferTimeout
from mooncake_hpc.core.trouble import Trouble
from mooncake_hpc.native.compile import Entry
from mooncake_hpc.transports import digest_kernels as digesting
from mooncake_hpc.transports import progress_kernels as leader
from mooncake_hpc.transports import queue_kernels as layout

log = logging.getLogger(__name__)

DEPTH = 1024  # batches in a lane's queue; more wait in `push`
OWN_TIMEOUT = 5_000_000_000  # ns for the thread that moves a lane's bytes to leave it: a native call takes 50 ms
SILENCE = 0.5  # seconds without a byte of a peer's that an error tells
CLOSE_TIMEOUT = 10.0  # seconds for a lane's thread to end
SPIN = 50_000  # ns: longer than a loopback round trip, shorter than what a sleep and a wake-up cost

SHARED_KERNELS = (  # what this module and `batch` call; transports compile them ahead with their own
    layout.enqueue, layout.await_room, layout.hurry, layout.seize, layout.go_up, layout.go_down, layout.ring_thread,
    layout.ring_leader, layout.abandon, layout.finish_head, layout.fail_all, layout.drop_cancelled, leader.drive,
    leader.attend, leader.await_work, leader.hand_over, leader.await_batch, leader.await_request,
    digesting.digest_requests,
)  # fmt: skip


def spin_time() -> int:
    """How long to poll before sleeping, in ns: not at all where the peer needs our only core."""
    return SPIN if len(os.sched_getaffinity(0)) > 1 else 0


def _placeholder() -> npt.NDArray[np.int64]:
    """See `transports.queue_kernels.take_out`."""
    block = np.zeros(layout.PLACEHOLDER_WORDS, np.int64)
    base = int(block.ctypes.data)
    for word, value in (
        (layout.REMAINING, layout.ENDLESS),
        (layout.EVENT, -1),
        (layout.CANCEL, 1),
        (layout.STATUS, base + layout.PLACEHOLDER_STATUS),
        (layout.PENDING, base + layout.PLACEHOLDER_PENDING),
        (layout.PLACEHOLDER_PENDING, layout.ENDLESS),
        (layout.PLACEHOLDER_SLICE + layout.META, layout.SKIPPED),
    ):
        block[word // 8] = value
    return block


def code_of(error: BaseException) -> int:
    """With which code a queue fails of it."""
    if isinstance(error, AuthenticationError):
        return layout.STRANGER
    silent = isinstance(error, PeerSilent) or (isinstance(error, OSError) and is_silent(error))
    return layout.SILENT if silent else layout.LOST


class Lane(ABC):
    """Carries slices to and from one peer in order. Subclasses say how bytes are moved, and repair the connection.

    `lead(lane, batch, until)` moves bytes for `leader.drive`, which whoever waits calls, and the lane's thread for what
    nobody waits on. Once a lane is DOWN its thread calls `repair`.
    """

    lead: Entry

    def __init__(self, name: str, peer: str, patience: float) -> None:
        self.name, self.peer = name, peer
        self.last_error = self._closed_since = ""
        self.words = np.zeros(layout.LANE_WORDS, np.int64)
        self.address = int(self.words.ctypes.data)
        self._head = self.words.data[layout.HEAD // 8 :]
        self._ring = np.zeros(DEPTH * layout.ENTRY // 8, np.int64)
        self._placeholder = _placeholder()
        self._set(layout.PLACEHOLDER, int(self._placeholder.ctypes.data))
        self._doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._set(layout.RING, int(self._ring.ctypes.data))
        self._set(layout.DEPTH, DEPTH)
        self._set(layout.DOORBELL, self._doorbell)
        self._set(layout.LANE_ONE, 1)
        self._set(layout.LEAD, self.lead.address)
        self._set(layout.SPIN, spin_time())
        self._set(layout.PATIENCE, int(patience * 1e9))
        self._lock = threading.Lock()
        self._queued: deque[tuple[int, object]] = deque()
        self._thread = threading.Thread(target=self._run, name=f"mooncake-{name}", daemon=True)

    def _launch(self) -> None:
        """Start the thread. Where there can be no further one, release all that the lane holds."""
        try:
            self._thread.start()
        except RuntimeError:
            self.close("its thread could not be started")
            raise

    @property
    def pending(self) -> bool:
        """Whether anything is queued."""
        return self._get(layout.HEAD) != self.queued

    @property
    def bytes(self) -> int:
        """Payload bytes completed since the start."""
        return int(self.words[layout.BYTES // 8])

    @property
    def queued(self) -> int:
        """The number of the last entry queued so far."""
        return self._get(layout.TAIL)

    def keep(self, number: int, batch: object) -> None:
        """Hold a queued batch until its entry has left the queue, and `drop_done` or `keep` is called."""
        self.drop_done()
        self._queued.append((number, batch))

    def why_late(self) -> str:
        """What the queue waits for, for messages; "" where bytes move."""
        if not self.pending:
            return ""
        if self._get(layout.STATE) != layout.UP:
            return f"no connection to {self.peer}: {self.last_error or 'it does not answer: stopped, or cut off?'}"
        silence = (time.monotonic_ns() - self._get(layout.PROGRESS)) / 1e9
        if silence < SILENCE:
            return ""
        return f"nothing has come from {self.peer} for {silence:.1f} s: stopped, busy or cut off?"

    def drop_done(self) -> None:
        """Let go of batches whose entries have left the queue, and of what they hold."""
        queued, head = self._queued, self._head[0]
        while queued and queued[0][0] <= head:
            try:
                first = queued.popleft()
            except IndexError:  # another thread was here
                break
            if first[0] > head:
                queued.appendleft(first)
                break

    def push(self, batch: object, address: int, slices: int, count: int, deadline: float) -> None:
        """Queue an entry of the batch at `address`; waits for room until `deadline` (time.monotonic()).

        Raises TransferTimeout, PeerLost when closed.
        """
        while True:
            try:
                number = layout.enqueue(self.address, slices, count, address)
                if number > 0:
                    self.keep(number, batch)
                    return
            except BaseException:  # Ctrl-C, with the entry in the queue or not
                self.keep(self.queued, batch)
                raise
            if number < 0:
                raise PeerLost(f"{self.peer}: the connection is closed: {self._closed_since}")
            if time.monotonic() > deadline:
                raise TransferTimeout(f"{self.peer}: {DEPTH} batches are queued and none ended before the deadline")
            self.hurry()
            layout.await_room(self.address, time.monotonic_ns() + 50_000_000)

    def drive(self, batch: int, until: int) -> int:
        """Move bytes or wait, at most until `until` (time.monotonic_ns()), for the batch at this address."""
        code: int = leader.drive(self.address, batch, until)
        return code

    def drive_to(self, batch: int, request: int, until: int) -> None:
        """As `drive`, until this one of the batch's requests is done."""
        leader.await_request(self.address, batch, request, until)

    def digest(self, batch: int, first: int, end: int, state: int, until: int) -> int:
        """As `drive_to` for the requests from `first` to `end`, each fed to an `xxh3.Digest` when it is done: the
        number of the first that is not, at `until` or since it failed."""
        number: int = digesting.digest_requests(self.address, batch, first, end, until, state)
        return number

    def hurry(self) -> None:
        """Have the lane's thread move the queue at once: somebody waits who cannot."""
        layout.hurry(self.address)

    def drop_cancelled(self) -> None:
        """Complete the cancelled batches in the queue of which nothing is under way, if there is a connection or not.

        Where a thread moves the lane's bytes, it makes way within NATIVE_CALL. No wait is longer than OWN_TIMEOUT.
        """
        with contextlib.suppress(PeerLost), self.owned():
            self._drop_cancelled()
        self.hurry()

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Be the lane's owner for a moment: nobody moves bytes meanwhile. Raises PeerLost."""
        if self._doorbell < 0:
            raise PeerLost(f"{self.peer}: the lane {self.name} is closed")
        self._set(layout.YIELD, 1)
        layout.ring_leader(self.address)
        try:
            if not layout.seize(self.address, time.monotonic_ns() + OWN_TIMEOUT):
                raise PeerLost(f"{self.peer}: the lane {self.name} is stuck")
        finally:
            self._set(layout.YIELD, 0)
        try:
            yield
        finally:
            leader.hand_over(self.address)

    @abstractmethod
    def _drop_cancelled(self) -> None:
        """As `drop_cancelled`, as the lane's owner."""

    @abstractmethod
    def interrupt(self) -> None:
        """Cut the connection under a cancelled batch; the others' slices go on over a new one."""

    def tend(self) -> None:
        """Called by the lane's thread whenever `attend` has returned."""
        return

    @abstractmethod
    def repair(self) -> None:
        """Called by the lane's thread when it is DOWN: leave it UP, or its queue failed.

        It owns the lane (`owned`) where it touches the queue, and not while it waits for anything: cancelled batches
        are taken out meanwhile. Whoever sets the peer's `interrupt` ends its waits.
        """

    def stop(self, cause: str) -> None:
        """Have the lane end, and fail what is queued as lost, with this cause; does not wait for it. Idempotent."""
        if self._get(layout.STATE) != layout.CLOSED:
            self._closed_since = cause
        self._set(layout.STATE, layout.CLOSED)
        if self._thread.is_alive():
            self.interrupt()
            layout.ring_thread(self.address)
            layout.ring_leader(self.address)

    def close(self, cause: str) -> None:
        """Fail what is queued, as `stop`, end the thread, release everything. Idempotent."""
        self.stop(cause)
        if not self._thread.is_alive():
            self._finish()
            return
        self._thread.join(CLOSE_TIMEOUT)

    def _finish(self) -> None:
        if self._doorbell < 0:  # closed before
            return
        seized = layout.seize(self.address, time.monotonic_ns() + OWN_TIMEOUT)
        self.last_error = self._closed_since
        self.fail_queue(layout.LOST)
        self.disconnect()
        if seized:
            self.let_go()
        with self._lock:  # producers ring the doorbell under it
            self._queued.clear()
            doorbell, self._doorbell = self._doorbell, -1
        if doorbell >= 0:
            os.close(doorbell)

    def fail_queue(self, code: int) -> None:
        """As the lane's owner: fail all that is queued."""
        layout.fail_all(self.address, code)

    @abstractmethod
    def disconnect(self) -> None:
        """Close the connection for good."""

    def let_go(self) -> None:
        """Called after `disconnect`, where nobody can be moving bytes any more: release what they were moved from."""
        return

    def _run(self) -> None:
        trouble = Trouble(log, f"{self.peer}: lane {self.name}", 1.0)
        while self._get(layout.STATE) != layout.CLOSED:
            try:
                leader.attend(self.address)
                self.tend()
                if self._get(layout.STATE) == layout.DOWN:
                    self.repair()
                    leader.await_work(self.address)
                trouble.over()
            except Exception as error:
                time.sleep(trouble.pause_s(error))
        self._finish()

    def _get(self, word: int) -> int:
        return int(self.words[word // 8])

    def _set(self, word: int, value: int) -> None:
        self.words[word // 8] = value
