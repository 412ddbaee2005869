"""Readers on equal links, simulated: each with a `Swarm` of its own, announcements that take their time, links shared
fairly among flows. The unit of time is what a link takes for one shard.

Beside the readers there may be other holders, most of them bad ones: see `Holder`."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

import numpy as np

from mooncake_hpc.p2p.peer_state import View
from mooncake_hpc.p2p.scheduler import Swarm

SHARD = 1 << 20
GRAIN = 0.25  # units between two looks at what has come


@dataclass(eq=False)
class Flow:
    reader: int
    source: int
    shard: int
    left: float = 1.0
    rate: float = 0.0
    told: int = 0  # bytes that the reader knows to have come


SILENCE = (3.0, 30.0)  # seconds without a byte after which a source counts as gone, as in source.py


@dataclass(frozen=True)
class Holder:
    """A holder that pulls nothing.

    `kind` is good, wrong (all bytes), mixed (every other shard is wrong), dead (refuses connections), silent (takes
    them, and gives nothing), drip (a thousandth of a link), idle (a reader that has nothing and fetches nothing) or
    lying (has nothing, and says that it is fetching everything). `has` is the share of shards that it says it has.
    """

    kind: str = "good"
    host: str = "far"
    has: float = 1.0
    until: float = float("inf")  # when its record vanishes


@dataclass
class Simulation:
    """`readers` nodes 1.. pull `shards` shards from node 0; `delay` units until an announcement is everywhere."""

    readers: int
    shards: int
    delay: float = 0.5
    settle: float = 1.0
    seed: int = 1
    starts: dict[int, float] = field(default_factory=dict)
    hosts: dict[int, str] = field(default_factory=dict)
    dies: dict[int, float] = field(default_factory=dict)
    slow: dict[int, float] = field(default_factory=dict)  # node: share of a link's rate
    others: dict[int, Holder] = field(default_factory=dict)  # by node, above the readers
    first: bool = True  # node 0 is there
    unit: float = 0.042  # seconds of one shard at the full rate, for the policy's rates and times

    def __post_init__(self) -> None:
        sizes = np.full(self.shards, SHARD, np.int64)
        all_, none = np.ones(self.shards, bool), np.zeros(self.shards, bool)
        self.swarms = {
            i: Swarm(self.name(i), self.hosts.get(i, str(i)), sizes, all_, none) for i in range(1, self.readers + 1)
        }
        self.views = {0: View(self.name(0), self.hosts.get(0, "0"), all_)} if self.first else {}
        chance = np.random.default_rng(self.seed)
        for node, other in self.others.items():
            have = chance.random(self.shards) < other.has if other.kind not in ("idle", "lying") else none
            fetching = {self.name(0): tuple(range(self.shards))} if other.kind == "lying" else {}
            host = f"{node}" if other.host == "far" else other.host
            self.views[node] = View(
                self.name(node),
                host,
                have,
                fetching,
                frozenset(range(self.shards)) if other.kind == "lying" and chance.random() < 0.5 else frozenset(),
            )
        self.silence: dict[tuple[int, int], float] = {}
        self.wasted = 0
        self.flows: list[Flow] = []
        self.now = 0.0
        self.sent = dict.fromkeys([*range(self.readers + 1), *self.others], 0)
        self.over_wire: dict[tuple[str, int], int] = {}
        self.finished: dict[int, float] = {}
        self.dead: set[int] = set()
        self.started: set[int] = set()
        self._events: list[tuple[float, int, str, int, object]] = []
        self._order = itertools.count()

    def name(self, node: int) -> str:
        return f"{node}/{self.seed}"

    def number(self, name: str) -> int:
        return int(name.partition("/")[0])

    def run(self, limit: float = 1e5) -> float:
        """Until all have finished; when the last did."""
        for i in self.swarms:
            self._at(self.starts.get(i, 0.0), "start", i)
        for i, time in self.dies.items():
            self._at(time, "die", i)
        for i, other in self.others.items():
            if other.until < float("inf"):
                self._at(other.until, "vanish", i)
        expected = set(self.swarms) - set(self.dies)
        while not expected <= self.finished.keys():
            self._share()
            next_flow = min((f.left / f.rate for f in self.flows if f.rate > 0), default=float("inf"))
            next_event = self._events[0][0] - self.now if self._events else float("inf")
            step = min(next_flow, next_event, GRAIN if self.flows else next_event)
            assert step < float("inf") and self.now < limit, self._stuck()
            self.now += step
            for flow in self.flows:
                flow.left -= step * flow.rate
                self._progress(flow)
            for flow in [f for f in self.flows if f.left <= 1e-9]:
                if any(f is flow for f in self.flows):  # not given up meanwhile
                    self._complete(flow)
            self._give_up_waiting()
            while self._events and self._events[0][0] <= self.now + 1e-12:
                _, _, kind, node, what = heapq.heappop(self._events)
                getattr(self, "_" + kind)(node, what)
            self._ask_all()
        return max(self.finished.values())

    def _stuck(self) -> str:
        return f"stuck at {self.now}: {sorted(set(self.swarms) - self.finished.keys())} flows {self.flows}"

    def _at(self, time: float, kind: str, node: int, what: object = None) -> None:
        heapq.heappush(self._events, (time, next(self._order), kind, node, what))

    def _start(self, node: int, _: object) -> None:
        self.started.add(node)
        for view in self.views.values():
            self.swarms[node].see(view, self.now * self.unit)
        self._announce(node)
        self._at(self.now + 1.0, "tick", node)

    def _tick(self, node: int, _: object) -> None:
        if node not in self.finished and node not in self.dead:
            self._at(self.now + 1.0, "tick", node)

    def _die(self, node: int, _: object) -> None:
        """All others learn of it from the connection over which they read its board."""
        self.dead.add(node)
        lost = [f for f in self.flows if node in (f.reader, f.source)]
        self.flows = [f for f in self.flows if f not in lost]
        for other in self.started - self.dead:
            mine = [f for f in lost if f.reader == other]
            shards, left = [f.shard for f in mine], sum(SHARD - f.told for f in mine)
            if self.name(node) in self.swarms[other].sources:
                self.swarms[other].failed(self.name(node), shards, left, self.now * self.unit)
        self._at(self.now + 200, "vanish", node)

    def _vanish(self, node: int, _: object) -> None:
        del self.views[node]
        for reader, swarm in self.swarms.items():
            swarm.forget(self.name(node))
            for flow in [f for f in self.flows if f.reader == reader and f.source == node]:
                self.flows.remove(flow)
                swarm.given_up(self.name(node), flow.shard, SHARD - flow.told)

    def _announce(self, node: int) -> None:
        swarm = self.swarms[node]
        view = View(self.name(node), swarm.host, swarm.have.copy(), swarm.fetching(), swarm.ending)
        self._at(self.now + self.delay, "hear", node, view)

    def _hear(self, node: int, view: object) -> None:
        assert isinstance(view, View)
        if node not in self.dead:
            self.views[node] = view
            for other in self.started - self.dead:
                self.swarms[other].see(view, self.now * self.unit)

    def _ask_all(self) -> None:
        for node in self.started - self.dead - self.finished.keys():
            if self.now < self.starts.get(node, 0.0) + self.settle:
                continue
            swarm, changed = self.swarms[node], False
            swarm.look(self.now * self.unit)
            for name in swarm.by_promise():
                while (shard := swarm.choose(name, self.now * self.unit)) is not None:
                    if swarm.under_way[shard] and self._racing(node):
                        self._take_away(node, shard)
                        break
                    swarm.begin(name, shard, self.now * self.unit)
                    changed = True
                    if self.number(name) in self.dead or self._kind(self.number(name)) == "dead":
                        swarm.failed(name, [shard], SHARD, self.now * self.unit)
                        break
                    self.flows.append(Flow(node, self.number(name), shard))
            if changed:
                self._announce(node)

    def _kind(self, node: int) -> str:
        return self.others[node].kind if node in self.others else "good"

    def _racing(self, node: int) -> bool:
        shards = [f.shard for f in self.flows if f.reader == node]
        return len({*shards}) < len(shards)

    def _take_away(self, node: int, shard: int) -> None:
        """As `Pull` does where a shard that comes slowly cannot be raced."""
        for flow in [f for f in self.flows if f.reader == node and f.shard == shard]:
            self.flows.remove(flow)
            left = SHARD - flow.told
            self.swarms[node].overtaken(self.name(flow.source), shard, left, self.now * self.unit)

    def _give_up_waiting(self) -> None:
        """A source that gives nothing for long counts as gone, and for longer the next time."""
        for pair in {(f.reader, f.source) for f in self.flows if self._kind(f.source) == "silent"}:
            reader, node = pair
            swarm, name = self.swarms[reader], self.name(node)
            silence = self.silence.get(pair, SILENCE[0])
            if self.now * self.unit - swarm.sources[name].heard > silence:
                self.silence[pair] = min(2 * silence, SILENCE[1])
                mine = [f for f in self.flows if (f.reader, f.source) == pair]
                self.flows = [f for f in self.flows if f not in mine]
                left = sum(SHARD - f.told for f in mine)
                swarm.failed(name, [f.shard for f in mine], left, self.now * self.unit)

    def _progress(self, flow: Flow) -> None:
        """A part of the shard has come."""
        nbytes = int(SHARD * (1 - flow.left)) - flow.told
        if flow.left > 1e-9 and nbytes > 0:
            swarm, name = self.swarms[flow.reader], self.name(flow.source)
            flow.told += nbytes
            swarm.received(name, nbytes, self.now * self.unit)
            if swarm.ends(name, flow.shard, SHARD - flow.told):
                self._announce(flow.reader)

    def _complete(self, flow: Flow) -> None:
        self.flows.remove(flow)
        swarm, name = self.swarms[flow.reader], self.name(flow.source)
        swarm.received(name, SHARD - flow.told, self.now * self.unit)
        self.sent[flow.source] += 1
        kind = self._kind(flow.source)
        if kind == "wrong" or (kind == "mixed" and flow.shard % 2):
            self.wasted += 1
            swarm.wrong(name, flow.shard, self.now * self.unit)
            return
        swarm.verified(name, flow.shard, self.now * self.unit)
        if not swarm.sources[name].local:
            at = swarm.host, flow.shard
            self.over_wire[at] = self.over_wire.get(at, 0) + 1
        for other in [f for f in self.flows if f.reader == flow.reader and f.shard == flow.shard]:
            self.flows.remove(other)
            swarm.overtaken(self.name(other.source), other.shard, SHARD - other.told, self.now * self.unit)
        self._announce(flow.reader)
        if swarm.done:
            self.finished.setdefault(flow.reader, self.now)

    def _speed(self, node: int) -> float:
        return {"silent": 0.0, "drip": 0.001}.get(self._kind(node), 1.0)

    def _share(self) -> None:
        """Max-min fair rates; a source serves the shards of one reader one after the other."""
        heads: dict[tuple[int, int], Flow] = {}
        for flow in self.flows:
            flow.rate = 0.0
            heads.setdefault((flow.reader, flow.source), flow)
        open_ = [f for f in heads.values() if not self.swarms[f.reader].sources[self.name(f.source)].local]
        for flow in heads.values():
            if flow not in open_:
                flow.rate = 20.0 * self._speed(flow.source)
        room: dict[tuple[str, int], float] = {}
        for flow in open_:
            room[("up", flow.source)] = self.slow.get(flow.source, 1.0) * self._speed(flow.source)
            room[("down", flow.reader)] = 1.0
        while open_:
            users: dict[tuple[str, int], int] = {}
            for flow in open_:
                for link in (("up", flow.source), ("down", flow.reader)):
                    users[link] = users.get(link, 0) + 1
            share, tight = min((room[link] / n, link) for link, n in users.items())
            for flow in [f for f in open_ if tight in (("up", f.source), ("down", f.reader))]:
                flow.rate = max(share, 1e-12)
                open_.remove(flow)
                for link in (("up", flow.source), ("down", flow.reader)):
                    room[link] -= share
