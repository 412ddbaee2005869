"""What fetches shards from one source: a thread that keeps a few pieces under way and hashes each as it arrives.

A *piece* is a part of a shard, read by one batch in requests of HASHED_AT_ONCE bytes. Each is hashed as soon as it is
here: it is in the cache still, and the next ones are on the wire. From a source whose memory is mapped here shards are
copied instead. The same thread reads the source's board now and then, as long as the source does not hold everything.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mooncake_hpc.core.errors import MooncakeError, PeerLost
from mooncake_hpc.core.request import READ, REQUEST
from mooncake_hpc.native import xxh3
from mooncake_hpc.p2p.availability import News
from mooncake_hpc.p2p.availability_poller import Watch, end_batch
from mooncake_hpc.p2p.catalog import Holder
from mooncake_hpc.p2p.copying import Copier
from mooncake_hpc.p2p.digests import HASHED_AT_ONCE, Hasher, receiving_hashers
from mooncake_hpc.p2p.layout import Bytes, Layout, Memory, pair
from mooncake_hpc.p2p.manifest import Manifest

if TYPE_CHECKING:
    from mooncake_hpc.engine.batch import Batch
    from mooncake_hpc.engine.engine import TransferEngine
    from mooncake_hpc.engine.remote_segment import Segment

log = logging.getLogger(__name__)

PIECE = (128 << 10, 4 << 20)  # bytes, at least and at most: half of what is asked of a source in advance
COPIED_AT_ONCE = 16 << 20  # bytes, about, of shards copied in one native call and told of together
LOOK = 0.05  # seconds between two looks at whether a shard is still wanted
SILENCE = (3.0, 30.0)  # seconds without a byte after which a source counts as gone: at first, and at most


@dataclass(slots=True, eq=False)
class Job:
    """A shard to fetch, bytes `begin` to `end` of the object, into `target`, from the holder `source`."""

    shard: int
    begin: int
    end: int
    target: Memory
    source: str = ""
    hasher: Hasher | None = None  # of what came in pieces
    asked: int = 0  # first byte not yet asked for
    hashed: int = 0  # first byte not yet hashed
    started: bool = False  # `target` may be written to
    abandoned: bool = False  # another source was faster, or is to be
    ended: threading.Event = field(default_factory=threading.Event)  # nothing touches `target` for it any more

    def __post_init__(self) -> None:
        self.asked = self.hashed = self.begin

    @property
    def left(self) -> int:
        """Bytes that have not come."""
        return self.end - self.hashed


@dataclass(slots=True)
class _Piece:
    job: Job
    batch: Batch
    ends: list[int]  # where in the object its requests end
    nbytes: int
    since: float
    come: int = 0  # requests that are here, and hashed


class Listener(Protocol):
    """The pull, as its workers see it. Called from their threads."""

    def next_jobs(self, source: str, nbytes: int) -> list[Job]: ...

    def window(self, source: str) -> int: ...

    def owns(self, job: Job) -> bool: ...

    def arrived(self, source: str, job: Job, nbytes: int) -> None: ...

    def complete(self, source: str, jobs: list[Job], digests: list[bytes]) -> None: ...

    def dropped(self, source: str, job: Job) -> None: ...

    def failed(self, source: str, jobs: list[Job], error: MooncakeError) -> None: ...

    def news(self, holder: Holder, news: News) -> float | None: ...


class Worker:
    """Fetches from `holder` what it is given by `give`, and more of its own accord, until `stop`.

    As long as the holder has a board and not all shards, reads it into `copy` and tells the listener, whose `news`
    returns the seconds until the next look, or None.
    """

    def __init__(
        self,
        engine: TransferEngine,
        holder: Holder,
        manifest: Manifest,
        copy: Bytes,
        listener: Listener,
    ) -> None:
        self.holder = holder
        self.copy = copy
        self.transport = ""
        self._engine, self._listener = engine, listener
        self._manifest, self._new_hasher = manifest, receiving_hashers(manifest.algorithm)
        self._remote = Layout(list(zip(holder.bases, manifest.sizes, strict=True)))
        self._given: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: deque[Job] = deque()
        self._pieces: deque[_Piece] = deque()
        self._bytes = 0  # under way
        self._piece = PIECE[0]
        self._stopping = False
        self._silence = SILENCE[0]
        self._heard = 0.0  # when the last piece came
        self._segment: Segment | None = None
        self._copier: Copier | None = None  # where the source's memory is mapped
        self._watch = Watch(engine, holder, copy, listener.news)
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
                self._wait()
                segment = self._connect()
                while not self._stopping:
                    self._watch.look(segment, None if self._jobs else LOOK, self._silence)
                    if not self._jobs:
                        break
                    self._step(segment)
            except MooncakeError as error:
                self._fail(error)
            except Exception as error:
                log.exception("fetching from %s", self.holder.segment)
                self._fail(PeerLost(f"{self.holder.segment}: {error!r}"))
        self._cancel([*self._jobs])
        self._watch.drop()
        while (job := self._take()) is not None:
            self._cancel([job])

    def _wait(self) -> None:
        """For a job, or until it is time to look at the board."""
        if self._jobs:
            return
        try:
            if (job := self._given.get(timeout=self._watch.left)) is not None:
                self._jobs.append(job)
        except queue.Empty:
            pass

    def _take(self) -> Job | None:
        try:
            return self._given.get_nowait()
        except queue.Empty:
            return None

    def _connect(self) -> Segment:
        """The segment, opened again after a failure."""
        if self._segment is None:
            segment = self._engine.open_segment(self.holder.segment)
            if segment.descriptor.generation != self.holder.generation:
                raise PeerLost(f"segment {self.holder.segment!r} now belongs to another process than the record says")
            with contextlib.suppress(PeerLost):  # its memory cannot be mapped here
                self._copier = Copier(segment, self._remote, self._manifest.algorithm)
            self.transport = segment.transport if self._copier is None else "shm"
            self._segment = segment
        return self._segment

    def _step(self, segment: Segment) -> None:
        """Ask for more, then take in the piece that was asked for first; or copy shards."""
        self._drop_abandoned()
        if self._copier is not None:
            self._copy(self._copier)
            return
        self._ask(segment)
        if self._pieces:
            self._take_in(self._pieces[0])

    def _copy(self, copier: Copier) -> None:
        """Copy what was taken, shards of COPIED_AT_ONCE bytes, and tell of them together."""
        for job in [*self._jobs]:
            self._start(job)
        jobs = [*self._jobs]
        if not jobs:
            return
        digests = copier.copy([(job.target, job.begin, job.end) for job in jobs])
        if digests != [self._manifest.digest(job.shard) for job in jobs]:
            copier.check()  # where the memory is something else now, the source has done no wrong
        for job in jobs[:-1]:
            job.hashed = job.end
        self._came(jobs[-1], jobs[-1].end, sum(job.end - job.begin for job in jobs[:-1]))
        self._finish(jobs, digests)
        self._more(COPIED_AT_ONCE)

    def _ask(self, segment: Segment) -> None:
        window = self._listener.window(self.holder.segment)
        self._piece = min(PIECE[1], max(PIECE[0], window // 2))
        while self._bytes < window or not self._pieces:
            job = next((job for job in self._jobs if job.asked < job.end), None)
            if job is not None:
                if self._start(job):
                    self._submit(job, segment)
            elif not self._more(1):
                return

    def _start(self, job: Job) -> bool:
        """Whether its memory may be written to from now on; if not, the job is ours no longer."""
        if job.started:
            return True
        job.started = True
        if job.abandoned and not self._listener.owns(job):
            self._jobs.remove(job)
            return False
        return True

    def _more(self, nbytes: int) -> bool:
        """Take the shard that we were given, or the next ones, of `nbytes` or more; False: there is none."""
        given = self._take()
        jobs = [given] if given is not None else self._listener.next_jobs(self.holder.segment, nbytes)
        self._jobs.extend(jobs)
        return bool(jobs)

    def _submit(self, job: Job, segment: Segment) -> None:
        begin, end = job.asked, min(job.asked + self._piece, job.end)
        reads = [
            (READ, segment.id, ours + at, theirs + at, min(HASHED_AT_ONCE, nbytes - at))
            for ours, theirs, nbytes in pair(job.target, self._remote, begin, end)
            for at in range(0, nbytes, HASHED_AT_ONCE)
        ]
        batch = self._engine.submit(np.array(reads, REQUEST))
        ends = [begin + nbytes for nbytes in accumulate(nbytes for *_, nbytes in reads)]
        self._pieces.append(_Piece(job, batch, ends, end - begin, time.monotonic()))
        self._bytes += end - begin
        job.asked = end

    def _take_in(self, piece: _Piece) -> None:
        """Hash the piece as it comes, for LOOK seconds at most, or without a request."""
        job, batch, before = piece.job, piece.batch, piece.come
        hasher = job.hasher = job.hasher or self._new_hasher(job.end - job.begin)
        if isinstance(hasher, xxh3.Digest):
            piece.come = batch.digest(before, hasher, LOOK)
        else:
            _hash(piece, hasher)
        if piece.come > before:
            self._came(job, piece.ends[piece.come - 1])
        if piece.come == len(piece.ends):
            self._pieces.popleft()
            self._bytes -= piece.nbytes
            if not job.left:
                self._finish([job], [hasher.digest()])
        elif (status := batch.join_request(piece.come, 0)) < 0:
            batch.join(LOOK)
            raise batch.error or PeerLost(f"segment {self.holder.segment!r} gives nothing")
        elif status == 0 and time.monotonic() - max(piece.since, self._heard) > self._silence:
            self._silence = min(2 * self._silence, SILENCE[1])
            raise PeerLost(f"segment {self.holder.segment!r} sends nothing")

    def _came(self, job: Job, end: int, others: int = 0) -> None:
        """The bytes up to `end` are here, and so many of other shards, which are told of at once: rates are measured
        by when bytes come."""
        nbytes, job.hashed = end - job.hashed + others, end
        self._heard, self._silence = time.monotonic(), SILENCE[0]
        self._listener.arrived(self.holder.segment, job, nbytes)

    def _finish(self, jobs: list[Job], digests: list[bytes]) -> None:
        for job in jobs:
            self._jobs.remove(job)
            job.ended.set()
        self._listener.complete(self.holder.segment, jobs, digests)

    def _drop_abandoned(self) -> None:
        if gone := [job for job in self._jobs if job.abandoned and job.started]:
            self._cancel(gone)

    def _cancel(self, jobs: list[Job]) -> None:
        """End these jobs; on return nothing touches their memory."""
        self._abort(jobs)
        for job in jobs:
            self._listener.dropped(self.holder.segment, job)

    def _fail(self, error: MooncakeError) -> None:
        jobs = [*self._jobs]
        self._abort(jobs)
        self._watch.rest()
        self._segment = self._copier = None
        self._listener.failed(self.holder.segment, jobs, error)

    def _abort(self, jobs: list[Job]) -> None:
        for piece in [piece for piece in self._pieces if piece.job in jobs]:
            self._pieces.remove(piece)
            self._bytes -= piece.nbytes
            end_batch(piece.batch)
        for job in jobs:
            if job in self._jobs:
                self._jobs.remove(job)
            job.ended.set()


def _hash(piece: _Piece, hasher: Hasher) -> None:
    """Hash the requests of the piece as they come, for LOOK seconds without one at most."""
    job, at = piece.job, piece.job.hashed
    while piece.come < len(piece.ends) and piece.batch.join_request(piece.come, LOOK) > 0:
        end = piece.ends[piece.come]
        for view in job.target.views(at, end):
            hasher.update(view)
        at, piece.come = end, piece.come + 1
