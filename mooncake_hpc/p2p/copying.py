"""Fetching from a process of this host: its memory is mapped here, and one pass over a shard copies and digests it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mooncake_hpc.core.errors import PeerLost
from mooncake_hpc.native import xxh3
from mooncake_hpc.p2p.digests import DEFAULT, HASHED_AT_ONCE, hashers
from mooncake_hpc.p2p.layout import Layout, Memory, pair

if TYPE_CHECKING:
    from mooncake_hpc.engine.remote_segment import Segment

Span = tuple[Memory, int, int]  # the object's bytes from here to there, and where they go


class Copier:
    """Copies shards out of a peer's memory, which `remote` lays out, into ours. It is mapped as long as this is held.

    Raises PeerLost when the peer does not offer all of the object, or not in memory that can be mapped here.
    """

    def __init__(self, segment: Segment, remote: Layout, algorithm: str) -> None:
        self._segment, self._algorithm = segment, algorithm
        self._extents = remote.extents(remote.begin, remote.end)
        views = [segment.mapped(*extent) for extent in self._extents]
        self._theirs = Memory([view for view in views if view is not None], remote.begin)
        if any(view is None for view in views):
            raise PeerLost(f"segment {segment.name!r} does not offer the object in memory that is mapped here")

    def check(self) -> None:
        """Raises PeerLost unless the peer still offers all of it: it may be using the memory for something else."""
        if any(self._segment.mapped(*extent) is None for extent in self._extents):
            raise PeerLost(f"segment {self._segment.name!r} does not offer the object any more")

    def copy(self, spans: Sequence[Span]) -> list[bytes]:
        """Copy the bytes of each span to its target; the digests of what came."""
        if self._algorithm != DEFAULT or min(end - begin for _, begin, end in spans) < xxh3.SHORTEST:
            return [self._copy_in_pieces(*span) for span in spans]
        return xxh3.copy_and_digest([pair(target, self._theirs, begin, end) for target, begin, end in spans])

    def _copy_in_pieces(self, target: Memory, begin: int, end: int) -> bytes:
        hasher, at = hashers(self._algorithm)(), begin
        for view in self._theirs.views(begin, end):
            for first in range(0, view.nbytes, HASHED_AT_ONCE):
                piece = view[first : first + HASHED_AT_ONCE]
                for ours in target.views(at, at + piece.nbytes):
                    ours[:] = piece
                    hasher.update(ours)
                at += piece.nbytes
        return hasher.digest()
