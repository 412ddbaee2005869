"""What fetches shards from one source: a thread that keeps a few pieces under way and hashes each as it arrives.

A *piece* is a part of a shard that fits the cache, read by one batch. While one is hashed the next ones are on the
wire.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mooncake_hpc.errors import MooncakeError, PeerLost, TransferError
from mooncake_hpc.p2p.catalogue import Holder
from mooncake_hpc.p2p.digests import Hasher
from mooncake_hpc.p2p.layout import Layout, Memory, pair
from mooncake_hpc.request import READ, REQUEST

if TYPE_CHECKING:
    from mooncake_hpc.batch import Batch
    from mooncake_hpc.engine import TransferEngine

log = logging.getLogger(__name__)

PIECE = 512 << 10  # bytes
LOOK = 0.05  # seconds between two looks at whether a shard is still wanted
SILENCE = (3.0, 30.0)  # seconds without a byte after which a source counts as gone: at first, and at most


@dataclass(slots=True, eq=False)
class Job:
    """A shard to fetch, bytes `begin` to `end` of the object, into `target`."""

    shard: int
    begin: int
    end: int
    target: Memory
    hasher: Hasher
    asked: int = 0  # first byte not yet asked for
    hashed: int = 0  # first byte not yet hashed
    abandoned: bool = False  # another source was faster
    ended: threading.Event = field(default_factory=threading.Event)  # nothing touches `target` for it any more

    def __post_init__(self) -> None:
        self.asked = self.hashed = self.begin


@dataclass(slots=True)
class _Piece:
    job: Job
    begin: int
    end: int
    batch: Batch
    since: float


class Listener(Protocol):
    """The pull, as its workers see it. Called from their threads."""

    def next_job(self, source: str) -> Job | None: ...

    def window(self, source: str) -> int: ...

    def arrived(self, source: str, nbytes: int, rate: float) -> None: ...

    def complete(self, source: str, job: Job) -> None: ...

    def dropped(self, source: str, job: Job) -> None: ...

    def failed(self, source: str, jobs: list[Job], error: MooncakeError) -> None: ...


class Worker:
    """Fetches from `holder` what it is given by `give`, and more of its own accord, until `stop`."""

    def __init__(self, engine: TransferEngine, holder: Holder, sizes: tuple[int, ...], listener: Listener) -> None:
        self.holder = holder
        self.transport = ""
        self._engine, self._listener = engine, listener
        self._remote = Layout(list(zip(holder.bases, sizes, strict=True)))
        self._given: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: deque[Job] = deque()
        self._pieces: deque[_Piece] = deque()
        self._bytes = 0  # under way
        self._stopping = False
        self._silence = SILENCE[0]
        self._heard = 0.0  # when the last piece came
        self._thread = threading.Thread(target=self._run, name=f"mooncake-p2p-{holder.segment}", daemon=True)
        self._thread.start()

    def give(self, job: Job) -> None:
        """A shard to fetch."""
        self._given.put(job)

    def stop(self) -> None:
        """Have the thread end; what is under way is cancelled and reported as dropped."""
        self._stopping = True
        self._given.put(None)

    def join(self, timeout: float) -> bool:
        """Whether the thread has ended within `timeout` seconds: nothing of it touches memory any more."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            try:
                if not self._jobs and not self._receive():
                    continue
                self._connect()
                while self._jobs and not self._stopping:
                    self._step()
            except MooncakeError as error:
                self._fail(error)
            except Exception as error:
                log.exception("fetching from %s", self.holder.segment)
                self._fail(PeerLost(f"{self.holder.segment}: {error!r}"))
        self._cancel([*self._jobs])
        while (job := self._take()) is not None:
            self._cancel([job])

    def _receive(self) -> bool:
        job = self._given.get()
        if job is not None:
            self._jobs.append(job)
        return job is not None

    def _take(self) -> Job | None:
        try:
            return self._given.get_nowait()
        except queue.Empty:
            return None

    def _connect(self) -> None:
        segment = self._engine.open_segment(self.holder.segment)
        if segment.descriptor.generation != self.holder.generation:
            raise PeerLost(f"segment {self.holder.segment!r} now belongs to another process than the record says")
        self.transport = segment.transport
        self._segment = segment

    def _step(self) -> None:
        """Ask for more, then take in the piece that was asked for first."""
        self._drop_abandoned()
        self._ask()
        if self._pieces:
            self._take_in(self._pieces[0])

    def _ask(self) -> None:
        window = self._listener.window(self.holder.segment)
        while self._bytes < window or not self._pieces:
            job = next((job for job in self._jobs if job.asked < job.end), None) or self._more()
            if job is None:
                return
            self._submit(job)

    def _more(self) -> Job | None:
        job = self._take() or self._listener.next_job(self.holder.segment)
        if job is not None:
            self._jobs.append(job)
        return job

    def _submit(self, job: Job) -> None:
        begin, end = job.asked, min(job.asked + PIECE, job.end)
        pairs = pair(job.target, self._remote, begin, end)
        requests = np.empty(len(pairs), REQUEST)
        requests["opcode"], requests["target_id"] = READ, self._segment.id
        requests["local_addr"], requests["remote_addr"], requests["length"] = zip(*pairs, strict=True)
        batch = self._engine.submit(requests)
        self._pieces.append(_Piece(job, begin, end, batch, time.monotonic()))
        self._bytes += end - begin
        job.asked = end

    def _take_in(self, piece: _Piece) -> None:
        if not piece.batch.join(LOOK):
            if time.monotonic() - max(piece.since, self._heard) > self._silence:
                self._silence = min(2 * self._silence, SILENCE[1])
                raise PeerLost(f"segment {self.holder.segment!r} sends nothing")
            return
        if (error := piece.batch.error) is not None:
            raise error
        self._pieces.popleft()
        job, nbytes, now = piece.job, piece.end - piece.begin, time.monotonic()
        took, self._heard = now - max(piece.since, self._heard), now
        self._bytes -= nbytes
        self._silence = SILENCE[0]
        for view in job.target.views(piece.begin, piece.end):
            job.hasher.update(view)
        job.hashed = piece.end
        self._listener.arrived(self.holder.segment, nbytes, nbytes / max(took, 1e-6))
        if job.hashed == job.end:
            self._jobs.remove(job)
            job.ended.set()
            self._listener.complete(self.holder.segment, job)

    def _drop_abandoned(self) -> None:
        if gone := [job for job in self._jobs if job.abandoned]:
            self._cancel(gone)

    def _cancel(self, jobs: list[Job]) -> None:
        """End these jobs; on return nothing touches their memory."""
        self._abort(jobs)
        for job in jobs:
            self._listener.dropped(self.holder.segment, job)

    def _fail(self, error: MooncakeError) -> None:
        jobs = [*self._jobs]
        self._abort(jobs)
        self._listener.failed(self.holder.segment, jobs, error)

    def _abort(self, jobs: list[Job]) -> None:
        for piece in [piece for piece in self._pieces if piece.job in jobs]:
            self._pieces.remove(piece)
            self._bytes -= piece.end - piece.begin
            _end(piece.batch)
        for job in jobs:
            if job in self._jobs:
                self._jobs.remove(job)
            job.ended.set()


def _end(batch: Batch) -> None:
    """Cancel, until it is done for certain: the memory is somebody's."""
    while not batch.done:
        try:
            batch.cancel()
        except TransferError:
            log.warning("a batch does not end", exc_info=True)
