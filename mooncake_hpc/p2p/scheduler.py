"""Which shard from whom: the policy of one reader. No sockets, no clock, no threads: callers bring the time and a lock.

Every reader decides for itself, from what the catalogue says of the others: what they hold, and what they are fetching
from whom. The rules:

1. *A host pulls a shard over the wire once.* What a process of this host holds is copied from it. What none holds is
   pulled by the one process whose turn it is.
2. *What no reader has leaves the first holder once.* Such shards leave in their order, a few at a time, and the readers
   take turns in an order that all of them compute alike: readers which start together share the object among themselves
   without a word. A turn that is not taken for long passes to the next one. Until all of them have been begun, those
   who hold all give nothing else: their links carry what only they can give. Such a shard is to be with a reader soon,
   as something to give to others: so few leave at a time, and who fetches one asks other readers for less meanwhile.
3. *Rarest first* among what several have.
4. *Least loaded source*: a source that serves `SLOTS` readers already is left to them as long as another one, less
   loaded, has something for us. The first holder is a source like any other.
5. A source that delivered wrong bytes is not asked for that shard again; one that failed gets a rest, longer each time,
   and so does one that was wrong again and again.
6. *Racing*: when nothing is left to begin, a shard that comes slowly is fetched again from a better source, or taken
   from the slow ones where there is no room beside it.
7. *Trust*: the rules above leave shards to others: a holder on this host, a less loaded source, a reader whose turn it
   is. Only those count that have earned it. Whoever fails, is wrong twice in a row or takes far too long is left out of
   all of them until a right shard has come from it (or, where it only did not answer, an answer). It is still asked, at
   a distance: it may be the only one. A reader that lets its turns pass has none, one that gets nothing for long has no
   claim. Claims of others thus cost time, once, and never the object.

The bound for N readers and M shards on equal links is (S/B)(1 + floor(log2 N)/M) seconds for S bytes at B bytes a
second: the first holder's link must carry each shard once, and the last shard then doubles its holders in each step.
What costs most is a shard that leaves the first holder twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

import numpy as np
import numpy.typing as npt

from mooncake_hpc.p2p.peer_state import MISSED, STRIKES, STUCK, Bits, Others, Source, View, claims

Shards = npt.NDArray[np.int64]

WIDTH = 8  # sources beyond the wire that one reader uses at a time
SPREAD = 2.0  # holders by which a reader departs from rarest first, lest all ask for the same shard at once
SLOTS = 3  # readers that a source beyond the wire serves at a time, where there is a choice
NEWS = 0.03  # seconds until a reader's news are everywhere
SLOW = 3.0  # a shard is raced when its source is so many times slower than another one
LEAVING = 4  # shards that leave a first holder at a time: as few as keep its link busy, since news of them take a while
PATIENCE = 1.0  # seconds after which a turn passes on, and a reader with nothing to do takes what it can get
STALLED = 5.0  # seconds in which a reader gets nothing, after which nobody counts on what it says it is fetching
LOOK = 0.05  # seconds between two looks at who is late


class Swarm:
    """One reader's pull of the shards in `wanted`, of which `have` are there. `sizes[i]` are bytes of shard i."""

    def __init__(self, me: str, host: str, sizes: npt.NDArray[np.int64], wanted: Bits, have: Bits) -> None:
        self.me, self.host = me, host
        self.sizes, self.wanted, self.have = sizes, wanted, have.copy()
        self.sources: dict[str, Source] = {}
        self.under_way = np.zeros(len(sizes), np.int16)  # sources that a shard is coming from
        self.busy = 0  # shards under way, those that come from two sources twice
        self._open = wanted & ~self.have  # to be asked for
        self._others = Others(host, len(sizes))
        self._claim = claims(me, len(sizes))
        self._ending: set[int] = set()  # shards that we nearly have
        self._awaited: dict[int, float] = {}  # shards that no reader had: since when
        self._order: tuple[list[str], dict[str, list[str]]] | None = None  # hosts, and readers by host
        self._passed: dict[int, int] = {}  # turns that have passed, by shard
        self._next_look = 0.0
        self._mates: list[str] = []  # readers on this host that got on when `_ours` was made
        self._ours: Bits | None = None
        self._idle_since: float | None = None
        self._cursor = 0

    # --- what others say ------------------------------------------------------------------------------------

    def see(self, view: View, now: float = 0.0, anew: bool = False) -> None:
        """A holder's record is new or has changed. `anew`: it is another process than before."""
        if view.name == self.me:
            return
        source = self.sources.get(view.name)
        if source is None:
            source = Source(view, view.host == self.host, claims(view.name, len(self.sizes)), grown=now)
            self.sources[view.name] = source
            self._order = self._ours = None
            self._next_look = 0.0
        else:
            took_turns = source.takes_turns
            if anew:
                source.refused, source.failures, source.strikes, source.rate = set(), 0, 0, 0.0
                source.resting_until = 0.0
            if anew or view.held > source.view.held:
                source.grown = now
                source.missed = 0
            if source.view.whole != view.whole or source.view.host != view.host or source.takes_turns != took_turns:
                self._order = self._ours = None
            source.local = view.host == self.host
            source.view = view
            source.judge(now)
        self._others.count(source)

    def forget(self, name: str) -> None:
        """A holder is gone. Shards under way from it end by `failed` or `given_up`."""
        source = self.sources.get(name)
        if source is None:
            return
        self._order = self._ours = None
        self._others.discount(name)
        if source.begun:  # its worker still has to report
            source.view, source.missed = View(name, source.view.host, np.zeros(len(self.sizes), bool)), MISSED
        else:
            del self.sources[name]

    def look(self, now: float) -> None:
        """Time has passed: who is late, whose rest has ended. To be called often; looks now and then."""
        if now < self._next_look:
            return
        self._next_look = now + LOOK
        for source in self.sources.values():
            source.late = self._is_late(source, now)
            self._judge(source, now)
        if self._mates != self._mates_now(now):
            self._ours = None

    def _is_late(self, source: Source, now: float) -> bool:
        """Whether what it was asked for takes far longer than it should."""
        if not source.begun or now - next(iter(source.begun.values())) < PATIENCE:
            return False
        left = source.time_left(now)
        return left > PATIENCE and left > SLOW * source.backlog / (self._rate(source) or inf)

    def _judge(self, source: Source, now: float) -> None:
        """Count the source by whether it is trusted."""
        if source.judge(now):
            self._recount(source)

    def _recount(self, source: Source) -> None:
        self._order = self._ours = None
        self._others.count(source)

    def load(self, name: str) -> int:
        """Other readers that fetch from this source."""
        return self._others.loads[name]

    def by_promise(self) -> list[str]:
        """All sources in the order in which they are to be asked: those that are trusted first, the least loaded."""
        return sorted(self.sources, key=lambda name: (not self.sources[name].trusted, self.load(name)))

    # --- decisions ------------------------------------------------------------------------------------------

    @property
    def needs_news(self) -> bool:
        """Whether it matters what others are fetching: not where all can be copied from a process of this host."""
        return not any(source.local and source.view.whole and source.trusted for source in self.sources.values())

    @property
    def done(self) -> bool:
        return bool(np.all(self.have | ~self.wanted))

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes verified, and bytes wanted."""
        return int(self.sizes[self.have & self.wanted].sum()), int(self.sizes[self.wanted].sum())

    def fetching(self) -> dict[str, tuple[int, ...]]:
        """Our claims: shards under way by source."""
        return {name: tuple(source.begun) for name, source in self.sources.items() if source.begun}

    @property
    def ending(self) -> frozenset[int]:
        """Shards that we nearly have."""
        return frozenset(self._ending)

    def choose(self, name: str, now: float) -> int | None:
        """The shard to ask of this source now, or None: then it is not to be asked for the moment."""
        source = self.sources.get(name)
        if source is None or now < source.resting_until:
            return None
        if source.local:
            return self._choose_here(source, now)
        if source.backlog >= self.ahead(source, now):
            return None
        open_ = source.has & self._open & (self._others.here == 0)
        if not open_.any():
            return self._race(source, now)
        return self._take_turn(source, open_, now)

    def _choose_here(self, source: Source, now: float) -> int | None:
        """What to copy from a process of this host."""
        near = self._near(now)
        if near is source and not source.refused:
            return self._next_in_order()
        open_ = source.has & self._open
        if near is not None and near is not source:
            open_ &= ~near.has
        return self._rarest(open_) if open_.any() else self._race(source, now)

    def _next_in_order(self) -> int | None:
        """The first shard to be asked for, sought on from the last one: there may be many, each soon copied."""
        rest = self._open[self._cursor :]
        if not rest.any():
            self._cursor, rest = 0, self._open
            if not rest.any():
                return None
        self._cursor += int(rest.argmax())
        return self._cursor

    def copying(self, now: float) -> bool:
        """Whether all that can be copied within this host is being copied, from a source that asks by itself."""
        near = self._near(now)
        return near is not None and bool(near.begun) and not near.refused

    def _near(self, now: float) -> Source | None:
        """A trusted process of this host that holds all: everything is copied from it, since to map the memory of each
        of the others costs more. The one in use, if there is one."""
        able = [s for s in self.sources.values() if s.local and s.view.whole and s.trusted and now >= s.resting_until]
        return min(able, key=lambda s: (not s.begun, not s.rate, s.view.name), default=None)

    def _take_turn(self, source: Source, open_: Bits, now: float) -> int | None:
        """A shard that no reader has yet and whose turn it is, or one that readers have."""
        fresh = source.has & ~self.have & (self._others.copies == 0)
        bored = self._bored(now)
        if fresh.any():
            shard = self._first_copy(source, np.flatnonzero(fresh), open_, now)
            if shard is not None or (self._reserved() and not bored):
                return shard
        if not source.begun and self.width >= WIDTH:
            return None
        common = open_ & (self._others.copies > 0) & self._ours_here(now)
        if not common.any():
            return None
        load = self.load(source.view.name)
        return None if load >= SLOTS and self._others_will_do(source, load, now) else self._rarest(common)

    def _first_copy(self, source: Source, fresh: Shards, open_: Bits, now: float) -> int | None:
        """The first of the shards `fresh` that is ours to fetch now."""
        room = self._window(source)
        patience = max(PATIENCE, SLOW * int(self.sizes[0]) / source.rate if source.rate else 0.0)
        for shard in fresh:
            passed = self._turns_passed(int(shard), now, patience)
            if open_[shard] and (passed or not self._others.coming[shard]) and self._turn(shard, passed):
                return int(shard)
            room -= not passed and not self._others.ending[shard] and shard not in self._ending
            if room <= 0:
                break
        return None

    def _turns_passed(self, shard: int, now: float, patience: float) -> int:
        """How many had their turn with a shard and did not bring it. It counts against the last one of them, and
        against those that say they are fetching it."""
        passed = int((now - self._awaited.setdefault(shard, now)) / patience)
        if passed > self._passed.get(shard, 0):
            self._passed[shard] = passed
            turn = self._whose_turn(shard, passed - 1)
            for name, source in self.sources.items():
                if name == turn or any(shard in shards for shards in source.view.fetching.values()):
                    source.missed += 1
                    if source.missed == MISSED:
                        self._recount(source)
        return passed

    def _reserved(self) -> bool:
        """Whether those who hold all give nothing else than what no reader has: until all of that has been begun."""
        unbegun = (self._others.coming == 0) & (self.under_way == 0)
        return bool((~self.have & (self._others.copies == 0) & unbegun).any())

    def _window(self, source: Source) -> int:
        """Shards that may be leaving for the first time at once, beside those that are nearly there: one of each whole
        holder until readers have something to give to others, so that the first ones come soon, and few afterwards;
        more where many leave in the time that news take."""
        rate = source.rate * (1 + self.load(source.view.name))
        giving = self._others.giving + bool(self.have.any())
        return self._others.whole * min(LEAVING, 1 + giving) + int(rate * NEWS / self.sizes[0])

    def ahead(self, source: Source, now: float) -> int:
        """Bytes to have under way from it: of a reader half as many while a shard that no reader has comes to us."""
        yields = not source.view.whole and any(self._gives_first(other, now) for other in self.sources.values())
        return source.ahead // 2 if yields else source.ahead

    def _gives_first(self, source: Source, now: float) -> bool:
        """Whether a shard that no reader has is coming from it, and is not nearly here."""
        if not source.begun or not source.view.whole or now - source.heard > STUCK:
            return False
        return any(not self._others.copies[shard] and shard not in self._ending for shard in source.begun)

    def _turn(self, shard: int, passed: int) -> bool:
        """Whether the shard is ours to fetch first, after `passed` others had their time. Hosts take turns, and the
        readers on a host."""
        return self._whose_turn(shard, passed) == self.me

    def _whose_turn(self, shard: int, passed: int) -> str:
        """The reader whose turn it is with the shard, after so many others."""
        if self._order is None:
            mates = {self.host: [self.me]}
            for s in self.sources.values():
                if not s.view.whole and s.takes_turns:
                    mates.setdefault(s.view.host, []).append(s.view.name)
            self._order = sorted(mates), {host: sorted(names) for host, names in mates.items()}
        hosts, mates = self._order
        names = mates[hosts[(shard + passed) % len(hosts)]]
        return names[(shard // len(hosts) + passed) % len(names)]

    def _rarest(self, open_: Bits) -> int | None:
        shards = np.flatnonzero(open_)
        if len(shards) == 0:
            return None
        holders = self._others.holders[shards] + self._others.coming[shards]  # soon
        return int(shards[np.argmin(holders - SPREAD * self._claim[shards])])

    @property
    def width(self) -> int:
        """Sources beyond the wire that are in use, and give something."""
        return sum(1 for other in self.sources.values() if other.begun and not other.local and not other.late)

    def _ours_here(self, now: float) -> Bits:
        """Shards that are ours to fetch, of the readers of this host that get on."""
        if self._ours is None:
            self._mates = self._mates_now(now)
            mates = [self.sources[name].claim for name in self._mates]
            self._ours = self._claim > np.maximum.reduce([np.zeros_like(self._claim), *mates])
        return self._ours

    def _mates_now(self, now: float) -> list[str]:
        return [s.view.name for s in self.sources.values() if s.local and not s.view.whole and self.gets_on(s, now)]

    def gets_on(self, source: Source, now: float) -> bool:
        """Whether a reader can be expected to get what it says it is fetching."""
        longest = SLOW * int(self.sizes[0]) / (self._rate() or inf) if len(self.sizes) else 0.0
        return source.trusted and now - source.grown < max(STALLED, longest)

    def _bored(self, now: float) -> bool:
        """Whether nothing has been under way to us for long."""
        if self.busy:
            self._idle_since = None
            return False
        if self._idle_since is None:
            self._idle_since = now
        return now - self._idle_since >= PATIENCE

    def _others_will_do(self, source: Source, load: int, now: float) -> bool:
        """Whether a less loaded source gives us something."""
        missing = self._open & (self._others.here == 0)
        reserved = self._reserved()
        return any(
            self.load(name) < load
            and other.trusted
            and now >= other.resting_until
            and not (reserved and other.view.whole)
            and (missing & other.has).any()
            for name, other in self.sources.items()
            if other is not source
        )

    def _race(self, source: Source, now: float) -> int | None:
        """A shard to fetch from this source although another one is at it, since that one is so slow."""
        if source.begun or (self._open & (self._others.here == 0)).any():
            return None
        left: dict[int, float] = {}
        for other in self.sources.values():
            for shard in other.begun:
                left[shard] = min(left.get(shard, inf), other.time_left(now) / SLOW)
        late = [
            (seconds, shard)
            for shard, seconds in left.items()
            if source.view.have[shard] and shard not in source.refused
        ]
        if not late:
            return None
        seconds, shard = max(late)
        return shard if seconds > self._time_for(source, int(self.sizes[shard])) else None

    def _time_for(self, source: Source, nbytes: int) -> float:
        """Seconds for so many bytes more from the source."""
        rate = source.rate or self._rate(source)
        return (source.backlog + nbytes) / rate if rate else STUCK

    def _rate(self, but: Source | None = None) -> float:
        """Bytes a second that a trusted source gives us on average, `but` for this one. 0: unknown."""
        rates = [other.rate for other in self.sources.values() if other.rate and other.trusted and other is not but]
        return sum(rates) / len(rates) if rates else 0.0

    # --- what happens ---------------------------------------------------------------------------------------

    def begin(self, name: str, shard: int, now: float) -> None:
        """The shard is asked of the source."""
        source = self.sources[name]
        source.asked(shard, int(self.sizes[shard]), now)
        self.under_way[shard] += 1
        self.busy += 1
        self._open[shard] = False

    def received(self, name: str, nbytes: int, now: float) -> None:
        """Some of what was asked of the source has come."""
        self.sources[name].delivered(nbytes, now)

    def ends(self, name: str, shard: int, left: int) -> bool:
        """So much of the shard has not come. Whether it is news that it will be here by the time that news take."""
        if shard in self._ending or left > self.sources[name].rate * NEWS:
            return False
        self._ending.add(shard)
        return True

    def verified(self, name: str, shard: int, now: float = 0.0) -> bool:
        """The shard has come whole and right. Whether it was missing."""
        source = self._ended(name, shard, 0)
        if source.strikes or source.failures:
            source.strikes = 0
            self.answered(name, now)
        news = not self.have[shard]
        self.have[shard] = True
        self._open[shard] = False
        return news

    def answered(self, name: str, now: float = 0.0) -> None:
        """The source is there after all."""
        source = self.sources[name]
        source.failures = 0
        self._judge(source, now)

    def given_up(self, name: str, shard: int, left: int) -> None:
        """The shard is not wanted from this source any more; `left` bytes of it have not come."""
        self._ended(name, shard, left)

    def overtaken(self, name: str, shard: int, left: int, now: float) -> None:
        """The source was too slow with the shard: it was taken from it, or came from another one."""
        source = self._ended(name, shard, left)
        source.strikes += 1
        source.rest(now, source.strikes - 1)
        self._judge(source, now)

    def wrong(self, name: str, shard: int, now: float = 0.0) -> None:
        """The source delivered bytes that do not match the digest."""
        source = self._ended(name, shard, 0)
        source.refused.add(shard)
        source.strikes += 1
        if source.strikes >= STRIKES:
            source.rest(now, source.strikes - STRIKES)
        source.judge(now)
        self._recount(source)

    def failed(self, name: str, shards: Iterable[int], left: int, now: float) -> None:
        """Nothing comes from the source for now; `left` bytes of these shards have not come. It has no turns, and what
        it was fetching is not waited for. It may be forgotten already."""
        source = self.sources.get(name)
        if source is None:
            return
        shards = [*shards]
        for shard in shards:
            self._ended(name, shard, 0)
        source.strikes += bool(shards)
        source.backlog -= left
        source.failures += 1
        source.rest(now, max(source.failures, source.strikes) - 1)
        source.judge(now)
        self._recount(source)

    def _ended(self, name: str, shard: int, left: int) -> Source:
        source = self.sources[name]
        del source.begun[shard]
        source.backlog -= left
        self.under_way[shard] -= 1
        self.busy -= 1
        self._ending.discard(shard)
        self._open[shard] = self.wanted[shard] and not self.have[shard] and self.under_way[shard] == 0
        return source
