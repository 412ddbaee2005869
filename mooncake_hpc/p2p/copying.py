"""Fetching from a process of this host: its memory is mapped here, and one pass over a shard copies and digests it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mooncake_hpc.errors import PeerLost
from mooncake_hpc.kernels import xxh3
from mooncake_hpc.memory import data_address
from mooncake_hpc.p2p.digests import DEFAULT, HASHED_AT_ONCE, hashers
from mooncake_hpc.p2p.layout import Bytes, Layout, Memory, pair

if TYPE_CHECKING:
    from mooncake_hpc.remote import Segment


class Copier:
    """Copies shards out of a peer's memory, which `remote` lays out, into ours."""

    def __init__(self, segment: Segment, remote: Layout, algorithm: str) -> None:
        self._segment, self._remote, self._algorithm = segment, remote, algorithm

    def reaches(self, begin: int, end: int) -> bool:
        """Whether all of the object's bytes from `begin` to `end` are mapped here."""
        return all(self._segment.mapped(*extent) is not None for extent in self._remote.extents(begin, end))

    def copy(self, target: Memory, begin: int, end: int) -> bytes:
        """Copy the object's bytes from `begin` to `end` to `target`; the digest of what came. PeerLost when the peer
        does not offer them any more."""
        pairs = pair(target, self._remote, begin, end)
        views = [self._view(address, nbytes) for _, address, nbytes in pairs]
        if self._algorithm == DEFAULT and end - begin >= xxh3.SHORTEST:
            extents = [(ours, data_address(view), view.nbytes) for (ours, *_), view in zip(pairs, views, strict=True)]
            return xxh3.copy_and_digest(np.array(extents, np.int64))
        hasher, at = hashers(self._algorithm)(), begin
        for view in views:
            for first in range(0, view.nbytes, HASHED_AT_ONCE):
                piece = view[first : first + HASHED_AT_ONCE]
                for ours in target.views(at, at + piece.nbytes):
                    ours[:] = piece
                    hasher.update(ours)
                at += piece.nbytes
        return hasher.digest()

    def _view(self, address: int, nbytes: int) -> Bytes:
        view = self._segment.mapped(address, nbytes)
        if view is None:
            raise PeerLost(f"segment {self._segment.name!r} does not offer the object any more")
        return view
