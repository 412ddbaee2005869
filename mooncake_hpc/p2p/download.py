"""A reader's pull of an object: the swarm's decisions carried out by one worker a source.

The thread that called `run` hands shards to workers as the catalogue or the state changes; a worker that has little
left under way takes its next shard itself. Everything is guarded by one lock; nothing slow happens under it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mooncake_hpc.core.errors import AuthenticationError, IntegrityError, MooncakeError, ObjectNotFound
from mooncake_hpc.p2p.availability import Board, MemoryPool, News, board_size, by_source, source_id
from mooncake_hpc.p2p.catalog import Holder
from mooncake_hpc.p2p.fetcher import Job, Worker
from mooncake_hpc.p2p.hope import Hope
from mooncake_hpc.p2p.layout import Memory
from mooncake_hpc.p2p.manifest import Manifest
from mooncake_hpc.p2p.peer_state import Bits, View
from mooncake_hpc.p2p.progress import Progress, Terms
from mooncake_hpc.p2p.racing import Scratch, put_in_place
from mooncake_hpc.p2p.scheduler import Swarm

if TYPE_CHECKING:
    from mooncake_hpc.engine.engine import TransferEngine

log = logging.getLogger(__name__)

TICK = 0.05  # seconds between two looks when nothing happens
BREATH = 0.002  # seconds in which changes gather before the next look
JOIN = 15.0  # seconds for a worker to end
NEWS = (0.02, 0.004)  # seconds between two looks at a board: at least, and for each holder
HURRY, CALM = 3.0, 3  # times as often while fewer sources than this are in use


def _same_place(one: Holder, other: Holder) -> bool:
    """Whether two records tell of the same memory of the same process."""
    return (one.generation, one.bases, one.board) == (other.generation, other.bases, other.board)


class Pull:
    """`have` are shards that are in `memory` already; `on_shard`, which must be quick, is told of each new one.

    `board`, where others shall see it, shows what is here and what is under way. `copies` is for others' boards.
    """

    def __init__(
        self,
        engine: TransferEngine,
        manifest: Manifest,
        memory: Memory,
        host: str,
        wanted: Bits,
        have: Bits,
        on_shard: Callable[[int], object],
        copies: MemoryPool,
        board: Board | None = None,
    ) -> None:
        self._engine, self._manifest, self._memory = engine, manifest, memory
        self._on_shard, self._copies, self._board = on_shard, copies, board
        spans = np.array([manifest.span(shard) for shard in range(manifest.shards)], np.int64).reshape(-1, 2)
        self.swarm = Swarm(engine.name, host, spans[:, 1] - spans[:, 0], wanted, have)
        self.lock = threading.Condition()
        self._changed = True
        self._copying = False  # all is being copied within this host: nothing to hand out until that ends
        self._holders: dict[str, Holder] = {}
        self._names: dict[int, str] = {source_id(engine.name): engine.name}  # by what stands for them in boards
        self._workers: dict[str, Worker] = {}
        self._old: list[Worker] = []
        self._jobs: dict[int, list[Job]] = {}
        self._ending = False
        self._scratch = Scratch(engine, manifest.shard_size)
        self._errors: dict[str, MooncakeError] = {}
        done, size = self.swarm.progress
        self.progress = Progress(size, done, int(wanted.sum()), int((have & wanted).sum()), done)

    # --- what the catalogue says ----------------------------------------------------------------------------

    def see(self, holder: Holder) -> None:
        """A record, which fits the manifest, is new or has changed."""
        with self.lock:
            before, have, fetching = self._holders.get(holder.segment), holder.have, {}
            same = before is not None and _same_place(before, holder)
            if same and (known := self.swarm.sources.get(holder.segment)) is not None:
                have, fetching = have | known.view.have, dict(known.view.fetching)
            elif not same:
                self._retire(holder.segment)
                self._errors.pop(holder.segment, None)
            self._holders[holder.segment] = holder
            self._names[source_id(holder.segment)] = holder.segment
            view = View(holder.segment, holder.host, have, fetching)
            self.swarm.see(view, time.monotonic(), anew=before is not None and not same)
            self._wake()

    def news(self, holder: Holder, news: News) -> float | None:
        """What a holder's board says. Seconds until the next look at it; None: it need not be looked at again."""
        with self.lock:
            present, known = self._holders.get(holder.segment), self.swarm.sources.get(holder.segment)
            if present is None or known is None or not _same_place(present, holder):
                return None
            now = time.monotonic()
            self.swarm.answered(holder.segment, now)
            before = known.view
            view = View(
                holder.segment, holder.host, news.have | before.have, by_source(news.claims, self._names), news.ending
            )
            told = view.fetching, view.ending, view.have.sum()
            if told != (before.fetching, before.ending, before.have.sum()):
                self.swarm.see(view, now)
                self._wake()
            pause = max(NEWS[0], NEWS[1] * len(self._holders))
            return None if view.whole else pause if self.swarm.width >= CALM else pause / HURRY

    def forget(self, segment: str) -> None:
        """A record is gone."""
        with self.lock:
            self._holders.pop(segment, None)
            self._retire(segment)
            self.swarm.forget(segment)
            self._wake()

    @property
    def holders(self) -> int:
        """Records known, without our own."""
        return len(self._holders)

    def _retire(self, segment: str) -> None:
        if (worker := self._workers.pop(segment, None)) is not None:
            worker.stop()
            self._old.append(worker)

    def _wake(self) -> None:
        self._changed = True
        self.lock.notify_all()

    # --- the caller's thread --------------------------------------------------------------------------------

    def run(self, terms: Terms, lost_after: float) -> None:
        """Until everything wanted is here. `lost_after`: seconds for which a shard that nobody holds is waited for.

        Raises TransferTimeout, TransferCancelled, IntegrityError, ObjectNotFound; on every way out nothing touches the
        memory any more.
        """
        started, told, hope = time.monotonic(), 0.0, Hope(self.swarm)
        try:
            while True:
                with self.lock:
                    if not self._changed:
                        self.lock.wait(TICK)
                    self._changed = False
                    self._hand_out(time.monotonic())
                    done = self.swarm.done
                    hope.look(time.monotonic())
                    self.progress.seconds = time.monotonic() - started
                if terms.tell is not None and (done or time.monotonic() - told > TICK):
                    told = time.monotonic()
                    terms.tell(self.progress)
                if done:
                    return
                terms.check(self._what, self._causes)
                self._check_strangers()
                if hope.lost is not None:
                    self._check_hope(hope.lost, time.monotonic() - hope.since, lost_after)
                time.sleep(BREATH)
        finally:
            self.progress.seconds = time.monotonic() - started
            self._end()

    def _what(self) -> str:
        manifest, progress = self._manifest, self.progress
        return (
            f"object {manifest.name!r} (version {manifest.version}): {progress.shards_done} of {progress.shards} "
            f"shards, {progress.done} of {progress.size} bytes; the pull"
        )

    def _causes(self) -> str:
        texts = [f"{name}: {error}" for name, error in self._errors.items()]
        return f" ({len(self._holders)} holders known" + "".join(f"; {text}" for text in texts[:3]) + ")"

    def _check_strangers(self) -> None:
        """Raise AuthenticationError where every holder has been refused, or refuses us: asking again is in vain."""
        with self.lock:
            errors = [self._errors.get(name) for name in self._holders]
        if errors and all(isinstance(error, AuthenticationError) for error in errors):
            raise AuthenticationError(f"{self._what()} ends{self._causes()}") from errors[0]

    def _hand_out(self, now: float) -> None:
        swarm = self.swarm
        swarm.look(now)
        self._copying = swarm.copying(now)
        if self._copying:
            return
        if swarm.needs_news:
            for name, holder in self._holders.items():
                if holder.board is not None and name not in self._workers:
                    self._worker(name)
        for name in swarm.by_promise():
            source = swarm.sources[name]
            if source.begun or name not in self._holders:
                continue  # its worker asks by itself
            job = self._begin(name, now)
            if job is not None:
                self._worker(name).give(job)

    def _worker(self, name: str) -> Worker:
        worker = self._workers.get(name)
        if worker is None:
            copy = self._copies.take(board_size(self._manifest.shards))
            worker = Worker(self._engine, self._holders[name], self._manifest, copy, self)
            self._workers[name] = worker
        return worker

    def _begin(self, name: str, now: float) -> Job | None:
        shard = self.swarm.choose(name, now)
        if shard is None:
            return None
        begin, end = self._manifest.span(shard)
        target = self._memory
        if self.swarm.under_way[shard]:
            racing = any(job.target is not self._memory for jobs in self._jobs.values() for job in jobs)
            if racing or (scratch := self._scratch.take(begin, end)) is None:
                for other in [*self._jobs[shard]]:
                    self._abandon(other, now)
                return None
            target = scratch
            self.progress.raced += 1
        job = Job(shard, begin, end, target, name)
        self.swarm.begin(name, shard, now)
        self._jobs.setdefault(shard, []).append(job)
        if self._board is not None:
            self._board.claim(name, shard)
        return job

    def _abandon(self, job: Job, now: float) -> None:
        """Take the shard from its source. Its worker lets go of the memory and says so; where it has not touched it
        yet, which may take long if the source does not even answer, it never will."""
        job.abandoned = True
        if not job.started:
            job.ended.set()
            self._let_go(job, now)

    def _let_go(self, job: Job, now: float) -> None:
        """The job has ended without its shard."""
        if self._forget(job):
            if job.abandoned and job.target is self._memory:
                self.swarm.overtaken(job.source, job.shard, job.left, now)
            else:
                self.swarm.given_up(job.source, job.shard, job.left)
            self._wake()

    def _check_hope(self, shard: int, seconds: float, lost_after: float) -> None:
        """The shard has had no source for so long. Raises IntegrityError, ObjectNotFound."""
        refused = [name for name, source in self.swarm.sources.items() if shard in source.refused]
        if refused and seconds > min(1.0, lost_after):
            raise IntegrityError(
                f"{self._what()} fails: shard {shard} of every source ({', '.join(refused)}) does not match its "
                f"{self._manifest.algorithm} digest"
            )
        if seconds > lost_after:
            raise ObjectNotFound(
                f"{self._what()} fails: nobody holds shard {shard} any more; waited {seconds:.1f} s for it"
                + self._causes()
            )

    def _end(self) -> None:
        with self.lock:
            self._ending = True
            workers = [*self._workers.values(), *self._old]
            self._workers.clear()
        for worker in workers:
            worker.stop()
        for worker in workers:
            while not worker.join(JOIN):
                log.warning("%s: a transfer does not end", worker.holder.segment)
            self._copies.give(worker.copy)
        self._scratch.close()

    # --- the workers' threads -------------------------------------------------------------------------------

    def next_jobs(self, source: str, nbytes: int) -> list[Job]:
        """What to fetch next: shards of `nbytes` or more, or what there is."""
        jobs: list[Job] = []
        with self.lock:
            now = time.monotonic()
            while nbytes > 0 and not self._ending and (job := self._begin(source, now)) is not None:
                jobs.append(job)
                nbytes -= job.left
        return jobs

    def window(self, source: str) -> int:
        with self.lock:
            known = self.swarm.sources.get(source)
            return self.swarm.ahead(known, time.monotonic()) if known is not None else 0

    def owns(self, job: Job) -> bool:
        """Whether an abandoned job is its worker's still: it was so before it knew of that, and so has to report it."""
        with self.lock:
            return job in self._jobs.get(job.shard, ())

    def arrived(self, source: str, job: Job, nbytes: int) -> None:
        with self.lock:
            self.swarm.received(source, nbytes, time.monotonic())
            if job.left and self.swarm.ends(source, job.shard, job.left):
                if self._board is not None:
                    self._board.ending(source, job.shard)
                self._wake()

    def complete(self, source: str, jobs: list[Job], digests: list[bytes]) -> None:
        good = [job for job, digest in zip(jobs, digests, strict=True) if self._usable(source, job, digest)]
        with self.lock:
            news = [job for job in good if self._verified(source, job)]
            if good and (not self._copying or self.progress.shards_done == self.progress.shards):
                self._wake()
        for job in news:
            self._on_shard(job.shard)

    def _usable(self, source: str, job: Job, digest: bytes) -> bool:
        """Whether what came is right, and in its place."""
        if digest != self._manifest.digest(job.shard):
            self._refuse(source, job)
            return False
        if job.target is not self._memory and not self._win(job):
            self.dropped(source, job)
            return False
        return True

    def _verified(self, source: str, job: Job) -> bool:
        """The shard is here. Whether it was missing."""
        now = time.monotonic()
        news = self.swarm.verified(source, job.shard, now)
        if self._board is not None:
            self._board.hold(job.shard)
        self._forget(job)
        for other in [*self._jobs.get(job.shard, ())]:
            self._abandon(other, now)
        if news:
            self._count(source, job)
        return news

    def _count(self, source: str, job: Job) -> None:
        self.progress.done += job.end - job.begin
        self.progress.shards_done += 1
        self.progress.sources[source] += job.end - job.begin
        if worker := self._workers.get(source):
            self.progress.transports[source] = worker.transport

    def _win(self, job: Job) -> bool:
        """Put a raced shard into its place, once the slower source is kept from it. False: the other was faster."""
        with self.lock:
            others = [other for other in self._jobs.get(job.shard, ()) if other is not job]
            for other in others:
                self._abandon(other, time.monotonic())
        for other in others:
            if not other.ended.wait(JOIN):
                return False
        with self.lock:
            if self.swarm.have[job.shard]:
                return False
        put_in_place(job, self._memory)
        return True

    def _refuse(self, source: str, job: Job) -> None:
        log.warning(
            "object %r: shard %d from %s does not match its digest: not asked for it again",
            self._manifest.name, job.shard, source,
        )  # fmt: skip
        with self.lock:
            self.swarm.wrong(source, job.shard, time.monotonic())
            self._forget(job)
            self.progress.wrong[source] += 1
            self._wake()

    def dropped(self, source: str, job: Job) -> None:
        with self.lock:
            self._let_go(job, time.monotonic())

    def failed(self, source: str, jobs: list[Job], error: MooncakeError) -> None:
        log.info("object %r: %s: %s", self._manifest.name, source, error)
        with self.lock:
            lost = [job for job in jobs if self._forget(job)]
            left = sum(job.left for job in lost)
            self.swarm.failed(source, [job.shard for job in lost], left, time.monotonic())
            self.progress.failures[source] += 1
            self._errors[source] = error
            self._wake()

    def _forget(self, job: Job) -> bool:
        """The job is under way no longer. False: it was not."""
        jobs = self._jobs.get(job.shard, [])
        if job not in jobs:
            return False
        if self._board is not None:
            self._board.unclaim(job.source, job.shard)
        jobs.remove(job)
        if not jobs:
            del self._jobs[job.shard]
        return True
