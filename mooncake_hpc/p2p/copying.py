"""Fetching from a process of this host: its memory is mapped here, and one pass over a shard copies and digests it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mooncake_hpc.errors import PeerLost
from mooncake_hpc.kernels import xxh3
from mooncake_hpc.memory import data_address
from mooncake_hpc.p2p.digests import DEFAULT, HASHED_AT_ONCE, hashers
from mooncake_hpc.p2p.layout import Bytes, Layout, Memory, pair

if TYPE_CHECKING:
    from mooncake_hpc.remote import Segment

Span = tuple[Memory, int, int]  # the object's bytes from here to there, and where they go


class Copier:
    """Copies shards out of a peer's memory, which `remote` lays out, into ours."""

    def __init__(self, segment: Segment, remote: Layout, algorithm: str) -> None:
        self._segment, self._remote, self._algorithm = segment, remote, algorithm

    def reaches(self, begin: int, end: int) -> bool:
        """Whether all of the object's bytes from `begin` to `end` are mapped here."""
        return all(self._segment.mapped(*extent) is not None for extent in self._remote.extents(begin, end))

    def copy(self, spans: Sequence[Span]) -> list[bytes]:
        """Copy the bytes of each span to its target; the digests of what came. PeerLost when the peer does not offer
        them any more."""
        if self._algorithm != DEFAULT or min(end - begin for _, begin, end in spans) < xxh3.SHORTEST:
            return [self._copy_in_pieces(*span) for span in spans]
        held, inputs = [], []  # what is read stays mapped as long as the views are held
        for target, begin, end in spans:
            extents = []
            for ours, theirs, nbytes in pair(target, self._remote, begin, end):
                view = self._view(theirs, nbytes)
                held.append(view)
                extents.append((ours, data_address(view), nbytes))
            inputs.append(extents)
        return xxh3.copy_and_digest(inputs)

    def _copy_in_pieces(self, target: Memory, begin: int, end: int) -> bytes:
        hasher, at = hashers(self._algorithm)(), begin
        for _, theirs, nbytes in pair(target, self._remote, begin, end):
            view = self._view(theirs, nbytes)
            for first in range(0, nbytes, HASHED_AT_ONCE):
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
