"""Whether what is missing can still come from somebody."""

from __future__ import annotations

import numpy as np

from mooncake_hpc.p2p.scheduler import Swarm


class Hope:
    """`lost` is a missing shard that no source can give, None where there is none; `since` when there has been one."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self.lost: int | None = None
        self.since = 0.0

    def look(self, now: float) -> None:
        """The caller holds the lock that guards the swarm."""
        lost = self._look(now)
        if self.lost is None:
            self.since = now
        self.lost = lost

    def _look(self, now: float) -> int | None:
        swarm = self._swarm
        if swarm.busy:
            return None
        possible = np.zeros(len(swarm.sizes), bool)
        for source in swarm.sources.values():
            possible |= source.has
            for shards in source.view.fetching.values() if swarm.gets_on(source, now) else ():
                possible[list(shards)] = True
        missing = np.flatnonzero(swarm.wanted & ~swarm.have & ~possible)
        return int(missing[0]) if len(missing) else None
