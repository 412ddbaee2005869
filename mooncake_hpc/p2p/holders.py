"""What a reader knows of the holders of an object: what they say of themselves, and how they have served us."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.bool_]

HORIZON = 0.02  # seconds of a source's rate that are asked of it in advance
AHEAD = (256 << 10, 8 << 20)  # bytes, at least and at most, asked of a source in advance


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
    whole: bool = field(init=False)  # it has all shards

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", bool(self.have.all()))
        if self.whole:
            object.__setattr__(self, "fetching", {})
            object.__setattr__(self, "ending", frozenset())


def claims(name: str, shards: int) -> npt.NDArray[np.float32]:
    """A reader's claim to each shard, 0 to 1: the highest one has the turn."""
    return np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogatepass"))).random(shards, np.float32)


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
    failures: int = 0
    resting_until: float = 0.0

    @property
    def ahead(self) -> int:
        """Bytes to have under way from it."""
        return int(min(AHEAD[1], max(AHEAD[0], self.rate * HORIZON)))
