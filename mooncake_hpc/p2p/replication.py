"""How an object comes here: found in the catalogue, received, pulled, and offered to others meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mooncake_hpc.core.errors import ConfigError, MetadataUnavailable, ObjectNotFound, ObjectReplaced, TransferCancelled
from mooncake_hpc.core.tensors import as_numpy, as_torch
from mooncake_hpc.engine.engine import TransferEngine
from mooncake_hpc.p2p.availability import Board, MemoryPool, board_size
from mooncake_hpc.p2p.catalog import CURRENT, Catalogue
from mooncake_hpc.p2p.download import Pull
from mooncake_hpc.p2p.layout import Bytes, Memory, pair
from mooncake_hpc.p2p.local_objects import LAST_WORDS, Held, Holdings
from mooncake_hpc.p2p.manifest import TENSORS, Manifest
from mooncake_hpc.p2p.mooncake_payload import Checkpoint, Fetch, find
from mooncake_hpc.p2p.peer_state import Bits
from mooncake_hpc.p2p.progress import Progress, Terms
from mooncake_hpc.p2p.receivers import range_receiver, receivers

LOOK = 1.0  # seconds between two looks for an object of the original's

Have = Callable[[Manifest, list[Bytes]], Bits]
OnShard = Callable[[Manifest, int], object]


@dataclass(slots=True)
class Replica:
    """What `get_replica` returns: the manifest, the object's buffers in its order, and how they came."""

    manifest: Manifest
    arrays: list[Bytes] = field(repr=False)
    progress: Progress

    def tensors(self, framework: str = "numpy") -> dict[str, Any]:
        """The object's tensors by name, as views of its memory: arrays, or torch's tensors with `framework="torch"`.

        What numpy has no dtype for (bfloat16, float8) is an array of ml_dtypes' where that is installed, else one of
        bytes (uint8) with one dimension more; the dtype's name is in `manifest.parts`. ConfigError when the object was
        not registered from a state dict, or torch has no such dtype.
        """
        if self.manifest.kind != TENSORS:
            raise ConfigError(f"object {self.manifest.name!r} consists of {self.manifest.kind}, not of tensors")
        if framework not in ("numpy", "torch"):
            raise ConfigError(f"framework {framework!r} is none of numpy, torch")
        view = as_numpy if framework == "numpy" else as_torch
        return {
            part.name: view(array, part.dtype, part.shape)
            for part, array in zip(self.manifest.parts, self.arrays, strict=True)
        }


class Replicator:
    """Brings objects into a store's holdings. A shard that nobody holds is waited for `lost_after` seconds.

    Whatever it raises, the holdings are as before.
    """

    def __init__(self, engine: TransferEngine, catalogue: Catalogue, holdings: Holdings, lost_after: float) -> None:
        self._engine, self._catalogue, self._holdings = engine, catalogue, holdings
        self._lost_after = lost_after
        self._copies = MemoryPool(engine, False)  # of others' boards

    def find(self, name: str, wait: float, terms: Terms) -> Manifest | Checkpoint:
        """The object of this name, waited for so many seconds. Raises ObjectNotFound, TransferCancelled."""
        found = self._look_up(name)
        if found is not None:
            return found
        end = time.monotonic() + wait if terms.deadline is None else min(terms.deadline, time.monotonic() + wait)
        there, looked = threading.Event(), time.monotonic()
        with self._catalogue.store.watch(self._catalogue.prefix(name) + CURRENT, lambda _: there.set()):
            while time.monotonic() < end and not terms.cancelled:
                there.wait(min(0.1, max(0.0, end - time.monotonic())))
                if there.is_set() or time.monotonic() > looked + LOOK:
                    there.clear()
                    looked = time.monotonic()
                    with contextlib.suppress(MetadataUnavailable):
                        found = self._look_up(name)
                    if found is not None:
                        return found
        if terms.cancelled:
            raise TransferCancelled(f"waiting for object {name!r} was cancelled")
        waited = f" within {wait:g} s" if wait else ""
        raise ObjectNotFound(f"nobody has registered an object {name!r} in {self._catalogue.store.spec}{waited}")

    def _look_up(self, name: str) -> Manifest | Checkpoint | None:
        """An object of ours, or else the original's."""
        return self._catalogue.current(name) or find(self._catalogue.store, name)

    def whole(
        self, manifest: Manifest, out: object, terms: Terms, have: Have | None, on_shard: OnShard | None
    ) -> Replica:
        """The object, offered to others while it comes and afterwards."""
        buffers, arrays = receivers(self._engine, manifest, out)
        held = Held(manifest, arrays, [], False, np.zeros(manifest.shards, bool), busy=True)
        with self._being_filled(held):
            self._own(held, buffers, out)
            if have is not None:
                held.have[:] = have(manifest, arrays)
            return Replica(manifest, arrays, self._pull(held, terms, on_shard))

    def part(self, manifest: Manifest, out: object, byte_range: tuple[int, int], terms: Terms) -> Replica:
        """A range of the object, not offered to others. Whole shards are pulled, since they are what can be verified;
        what of them is not asked for is let go."""
        begin, end = byte_range
        target = range_receiver(manifest, out, begin, end)
        first, last = begin // manifest.shard_size, -(-end // manifest.shard_size)
        wanted = np.zeros(manifest.shards, bool)
        wanted[first : last if end > begin else first] = True
        low, high = manifest.span(first)[0], max(end, manifest.span(last - 1)[1]) if end > begin else end
        head, tail = np.empty(begin - low, np.uint8), np.empty(high - end, np.uint8)
        pieces = [array for array in (head, target, tail) if array.nbytes]
        held = Held(manifest, [], pieces, False, np.zeros(manifest.shards, bool))
        self._engine.register_many(pieces, remote_accessible=False)
        try:
            memory = Memory([head, target, tail], low)
            self._copy_ours(held, memory, wanted)
            held.pull = pull = self._new_pull(held, memory, wanted, lambda _: None)
            self._holdings.follow(held)
            self._run(held, pull, terms)
            return Replica(manifest, [target], pull.progress)
        finally:
            self._holdings.let_go(held)

    def _copy_ours(self, held: Held, memory: Memory, wanted: Bits) -> None:
        """Shards that this store holds itself: it is no source of its own, and may be the only holder."""
        ours = self._holdings.get(held.manifest.name)
        if ours is None or ours.manifest.version != held.manifest.version:
            return
        source = Memory(ours.arrays)
        held.have |= ours.have & wanted
        for shard in np.flatnonzero(held.have):
            for here, there, nbytes in pair(memory, source, *held.manifest.span(int(shard))):
                ctypes.memmove(here, there, nbytes)

    def original(
        self, checkpoint: Checkpoint, out: object, byte_range: tuple[int, int] | None, terms: Terms
    ) -> Replica:
        """The original's object, or a range of it: not verified, and not offered to others."""
        manifest = checkpoint.manifest()
        begin, end = byte_range or (0, manifest.size)
        if byte_range is None:
            buffers, arrays = receivers(self._engine, manifest, out)
        else:
            arrays = [range_receiver(manifest, out, begin, end)]
            buffers = [*arrays]
        held = Held(manifest, arrays, [], False, np.ones(len(checkpoint.shards), bool), busy=True)
        with self._being_filled(held):
            self._own(held, buffers, out if byte_range is None else buffers)
            result = Fetch(self._engine, checkpoint, Memory(arrays, begin)).run(terms)
        if byte_range is not None:
            self._holdings.release(manifest.name, held)
        return Replica(manifest, arrays, result)

    @contextlib.contextmanager
    def _being_filled(self, held: Held) -> Iterator[None]:
        """The object is among the holdings from now on, unless this fails."""
        self._holdings.add(held.manifest.name, held)
        try:
            yield
        except BaseException:
            self._holdings.release(held.manifest.name, held)
            raise
        held.busy = False

    def _own(self, held: Held, buffers: list[object], out: object) -> None:
        """Buffers that were allocated for the object are let go with it; those of the caller's are registered."""
        if out is None:
            held.registered = [buffer for buffer in buffers if isinstance(buffer, np.ndarray)]
        else:
            sizes = [array.nbytes for array in held.arrays]
            self._holdings.register_memory(held, [b for b, size in zip(buffers, sizes, strict=True) if size])

    def _pull(self, held: Held, terms: Terms, on_shard: OnShard | None) -> Progress:
        manifest = held.manifest

        def verified(shard: int) -> None:
            if on_shard is not None:
                on_shard(manifest, shard)
            held.have[shard] = True
            if held.announcer is not None:
                held.announcer.changed()

        held.board = Board(self._holdings.boards.take(board_size(manifest.shards)), held.have)
        held.pull = pull = self._new_pull(held, Memory(held.arrays), np.ones(manifest.shards, bool), verified)
        self._holdings.offer(held)
        self._run(held, pull, terms)
        assert held.announcer is not None
        held.pull = None
        held.announcer.changed()
        held.announcer.finish(LAST_WORDS)
        return pull.progress

    def _new_pull(self, held: Held, memory: Memory, wanted: Bits, on_shard: Callable[[int], object]) -> Pull:
        return Pull(
            self._engine,
            held.manifest,
            memory,
            self._holdings.host,
            wanted,
            held.have,
            on_shard,
            self._copies,
            held.board,
        )

    def _run(self, held: Held, pull: Pull, terms: Terms) -> None:
        try:
            pull.run(terms, self._lost_after)
        except ObjectNotFound as error:
            if held.current not in (None, held.manifest.version):
                raise ObjectReplaced(f"{error}; {held.manifest.name!r} now is version {held.current}") from error
            raise

    def close(self) -> None:
        """Let go of memory; the engine is closed."""
        self._copies.clear()
