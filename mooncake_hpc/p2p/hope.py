"""Whether what is missing can still come from somebody."""

from __future__ import annotations

import numpy as np

from mooncake_hpc.p2p.swarm import Swarm


class Hope:
    """`lost` is a missing shard that no source can give, None where there is none; `since` when there has been one."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self.lost: int | None = None
        self.since = 0.0

    def look(self, now: float) -> None:
        """The caller holds the lock that guards the swarm."""
        lost = self._look()
        if self.lost is None:
            self.since = now
        self.lost = lost

    def _look(self) -> int | None:
        swarm = self._swarm
        if swarm.busy:
            return None
        possible = np.zeros(len(swarm.sizes), bool)
        for source in swarm.sources.values():
            offered = source.view.have.copy()
            offered[list(source.refused)] = False
            possible |= offered
            for shards in source.view.fetching.values():
                possible[list(shards)] = True
        missing = np.flatnonzero(swarm.wanted & ~swarm.have & ~possible)
        return int(missing[0]) if len(missing) else None
