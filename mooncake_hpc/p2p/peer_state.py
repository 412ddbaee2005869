"""What a reader knows of the holders of an object: what they say of themselves, and how they have served us."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.bool_]

HORIZON = 0.02  # seconds of a source's rate that are asked of it in advance
AHEAD = (256 << 10, 8 << 20)  # bytes, at least and at most, asked of a source in advance
SPAN = (0.005, 0.1)  # seconds over which a source's rate is measured: at first, since bytes come in bursts, and later
STRIKES = 2  # shards in a row after which a source is not trusted any more: one may be an accident
MISSED = 2  # turns that a reader lets pass before it has none any more, and nothing that it claims counts
REST = (0.25, 8.0)  # seconds that a source which failed is left alone: at first, and at most
STUCK = 1.0  # seconds without a byte after which a source counts as slow


@dataclass(frozen=True, slots=True)
class View:
    """What a holder says of itself. `fetching` are the shards under way to it, by source, `ending` those of them that
    are nearly there; none once it has all, though the last board read may claim some: it is not read again, and nobody
    is to wait for those claims to end."""

    name: str
    host: str
    have: Bits
    fetching: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ending: frozenset[int] = frozenset()
    held: int = field(init=False)  # shards that it has
    whole: bool = field(init=False)  # it has all shards

    def __post_init__(self) -> None:
        object.__setattr__(self, "held", int(np.count_nonzero(self.have)))
        object.__setattr__(self, "whole", self.held == len(self.have))
        if self.whole:
            object.__setattr__(self, "fetching", {})
            object.__setattr__(self, "ending", frozenset())


def claims(name: str, shards: int) -> npt.NDArray[np.float32]:
    """A reader's claim to each shard, 0 to 1: the highest one has the turn."""
    return np.random.default_rng(zlib.crc32(name.encode())).random(shards, np.float32)


class Others:
    """What all other holders hold and are fetching, counted by shard: of those that are trusted, what they say and have
    not been found to lack. Of the rest only that they hold all counts."""

    def __init__(self, host: str, shards: int) -> None:
        """`host` is ours."""
        self._host = host
        self._counted: dict[str, _Counted] = {}
        self.holders = np.zeros(shards, np.int32)  # that hold a shard
        self.copies = np.zeros(shards, np.int32)  # that hold it and not all
        self.here = np.zeros(shards, np.int32)  # that hold it on this host
        self.coming = np.zeros(shards, np.int32)  # that are fetching it
        self.ending = np.zeros(shards, np.int32)  # that nearly have it
        self.whole = 0  # that hold all
        self.giving = 0  # that hold a shard, and not all
        self.loads: Counter[str] = Counter()  # that fetch from a source

    def count(self, source: Source) -> None:
        """Count what is known of the source now, in place of what was counted of it."""
        self.discount(source.view.name)
        counted = _Counted(source.view, source.has, source.trusted, source.takes_turns)
        self._counted[source.view.name] = counted
        self._add(counted, 1)

    def discount(self, name: str) -> None:
        """The source counts no longer."""
        if (counted := self._counted.pop(name, None)) is not None:
            self._add(counted, -1)

    def _add(self, counted: _Counted, sign: int) -> None:
        view, has = counted.view, counted.has
        self.whole += sign * view.whole
        self.giving += sign * (not view.whole and bool(has.any()))
        if not counted.trusted:
            return
        self.holders += sign * has
        if not view.whole:
            self.copies += sign * has
        if view.host == self._host:
            self.here += sign * has
        if not counted.takes_turns:
            return
        for name, shards in view.fetching.items():
            self.coming[list(shards)] += sign
            self.loads[name] += sign
        self.ending[list(view.ending)] += sign


@dataclass(frozen=True, slots=True)
class _Counted:
    """What was counted of a source: its view, the shards that it has as far as we know, what it was trusted with."""

    view: View
    has: Bits
    trusted: bool
    takes_turns: bool


@dataclass(slots=True)
class Source:
    """A holder as we see it, and how it has served us."""

    view: View
    local: bool
    claim: npt.NDArray[np.float32]
    rate: float = 0.0  # bytes a second that it gives us; 0: unknown
    backlog: int = 0  # bytes asked of it and not yet here
    begun: dict[int, float] = field(default_factory=dict)  # shards under way: when asked for
    heard: float = 0.0  # when the last bytes came
    mark: float = 0.0  # since when `amount` bytes have come
    amount: int = 0
    refused: set[int] = field(default_factory=set)  # shards that it does not really have
    failures: int = 0  # in a row: it did not answer
    strikes: int = 0  # shards in a row that it was asked for and did not give, or not rightly
    late: bool = False  # what it was asked for takes far too long
    trusted: bool = True  # whether others are left alone for what it has
    missed: int = 0  # turns that it let pass, since it last got something
    grown: float = 0.0  # when it was first seen, or last got something
    resting_until: float = 0.0

    @property
    def has(self) -> Bits:
        """The shards that it says it has, without those that it was found to lack."""
        if not self.refused:
            return self.view.have
        has = self.view.have.copy()
        has[list(self.refused)] = False
        return has

    @property
    def takes_turns(self) -> bool:
        """Whether what it is to fetch, or says it is fetching, is left to it."""
        return self.trusted and self.missed < MISSED

    def judge(self, now: float) -> bool:
        """Decide whether it is trusted. Whether that has changed."""
        before = self.trusted
        self.trusted = not (self.failures or self.strikes >= STRIKES or self.late or now < self.resting_until)
        return self.trusted != before

    def rest(self, now: float, times: int) -> None:
        """Leave it alone, for twice as long each time."""
        self.resting_until = max(self.resting_until, now + min(REST[1], REST[0] * 2 ** min(times, 32)))

    @property
    def ahead(self) -> int:
        """Bytes to have under way from it."""
        return int(min(AHEAD[1], max(AHEAD[0], self.rate * HORIZON)))

    def asked(self, shard: int, nbytes: int, now: float) -> None:
        """The shard is asked of it."""
        if not self.backlog:
            self.heard = self.mark = now
            self.amount = 0
        self.begun[shard] = now
        self.backlog += nbytes

    def delivered(self, nbytes: int, now: float) -> None:
        """Some of what was asked has come."""
        self.backlog -= nbytes
        self.heard = now
        self.amount += nbytes
        span = now - self.mark
        if span >= (SPAN[1] if self.rate else SPAN[0]):
            rate = self.amount / span
            self.rate = (self.rate + rate) / 2 if self.rate else rate
            self.mark, self.amount = now, 0

    def time_left(self, now: float) -> float:
        """Seconds until all that was asked will have come."""
        silent = now - self.heard
        if silent > STUCK and self.backlog:
            return float("inf")
        return self.backlog / self.rate if self.rate else silent
