"""P2PStore: objects that one process registers and any number of others replicate from it and from one another."""

from __future__ import annotations

import builtins
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mooncake_hpc.engine import TransferEngine
from mooncake_hpc.errors import (
    ConfigError,
    MetadataUnavailable,
    ObjectExists,
    ObjectNotFound,
    ObjectReplaced,
    P2PError,
    TransferCancelled,
)
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.p2p.board import Board, MemoryPool, board_size
from mooncake_hpc.p2p.buffers import as_bytes, as_range, digest_all, take_apart
from mooncake_hpc.p2p.catalogue import CURRENT, Catalogue, Holder, ObjectInfo
from mooncake_hpc.p2p.digests import DEFAULT
from mooncake_hpc.p2p.holders import Bits
from mooncake_hpc.p2p.holding import LAST_WORDS, Held, Holdings
from mooncake_hpc.p2p.layout import Memory
from mooncake_hpc.p2p.manifest import (
    TENSORS,
    Manifest,
    Part,
    check_name,
    choose_shard_size,
    new_version,
)
from mooncake_hpc.p2p.progress import OnProgress, Progress
from mooncake_hpc.p2p.pull import Pull
from mooncake_hpc.p2p.receivers import range_receiver, receivers
from mooncake_hpc.p2p.upstream import Checkpoint, Fetch, find, list_originals
from mooncake_hpc.settings import Settings

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
LOOK = 1.0  # seconds between two looks for an object of the original's


@dataclass(slots=True)
class Replica:
    """What `get_replica` returns: the manifest, the object's buffers in its order, and how they came."""

    manifest: Manifest
    arrays: list[Bytes]
    progress: Progress

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """The object's tensors by name, as views. ConfigError when it was not registered from a state dict."""
        if self.manifest.kind != TENSORS:
            raise ConfigError(f"object {self.manifest.name!r} consists of {self.manifest.kind}, not of tensors")
        return {
            part.name: array.view(np.dtype(part.dtype)).reshape(part.shape)
            for part, array in zip(self.manifest.parts, self.arrays, strict=True)
        }


class P2PStore:
    """A process's share in all objects. A context manager; thread-safe.

    Builds an engine `name` over `metadata` (as `TransferEngine`'s), or takes `engine`, which stays the caller's, with
    the MetadataStore that it was made with.
    """

    def __init__(
        self,
        name: str = "",
        metadata: str | MetadataStore = "",
        *,
        protocol: str = "auto",
        engine: TransferEngine | None = None,
        settings: Settings | None = None,
        **engine_options: Any,
    ) -> None:
        self._settings = settings or Settings.from_env()
        self._stack = contextlib.ExitStack()
        try:
            store = metadata
            if isinstance(store, str):
                store = self._stack.enter_context(open_store(store, self._settings))
            if engine is None:
                engine = self._stack.enter_context(
                    TransferEngine(name, store, protocol=protocol, settings=self._settings, **engine_options)
                )
        except BaseException:
            self._stack.close()
            raise
        self.engine = engine
        self.name = engine.name
        self._catalogue = Catalogue(store, self._settings.metadata_cluster_id)
        self._holdings = Holdings(engine, self._catalogue)
        self._copies = MemoryPool(engine, False)  # of others' boards

    # --- for those who have an object -----------------------------------------------------------------------

    def register(
        self,
        name: str,
        data: object,
        *,
        shard_size: int = 0,
        algorithm: str = DEFAULT,
        force: bool = False,
        kind: str = "",
        parts: Sequence[Part] = (),
        owned: Sequence[Bytes] = (),
    ) -> Manifest:
        """Offer `data` under `name`: an array (or what `TransferEngine.register` takes), a list of them, or a state
        dict `{name: array or tensor}`. It must not change until `unregister`. `shard_size` in bytes; 0 chooses one.
        `owned` is memory that `allocate` made, to be given back by `unregister`.

        Registering a name that this store holds makes a new version of it. One that somebody else holds is
        ObjectExists, unless the content is equal (then this store becomes one more holder) or `force`. Raises
        ConfigError, RegistrationError, MetadataError.
        """
        check_name(name)
        buffers, found_kind, found_parts = take_apart(data)
        arrays = [as_bytes(buffer) for buffer in buffers]
        sizes = tuple(array.nbytes for array in arrays)
        if not isinstance(shard_size, int | np.integer) or shard_size < 0:
            raise ConfigError(f"shard_size {shard_size!r} is no number of bytes")
        shard = int(shard_size) or choose_shard_size(sum(sizes))
        digests = digest_all(Memory(arrays), shard, algorithm)
        manifest = Manifest(
            name, new_version(), sizes, shard, algorithm, digests, kind or found_kind, tuple(parts) or found_parts
        )
        before = self._holdings.get(name)
        if before is not None and before.busy:
            raise P2PError(f"object {name!r} is being pulled into this store")
        held = Held(manifest, arrays, [], True, np.ones(manifest.shards, bool))
        self._holdings.register_memory(held, [buffer for buffer, size in zip(buffers, sizes, strict=True) if size])
        try:
            manifest = self._publish(manifest, force or before is not None)
            held.manifest = manifest
            self._holdings.offer(held)
        except BaseException:
            self._holdings.unregister_memory(held)
            raise
        held.registered += owned
        self._holdings.replace(name, held)
        return manifest

    def _publish(self, manifest: Manifest, replace_it: bool) -> Manifest:
        if self._catalogue.publish(manifest, replace_it):
            return manifest
        theirs = self._catalogue.current(manifest.name)
        if theirs is None:  # it went this moment
            return self._publish(manifest, True)
        if not theirs.same_content(manifest):
            raise ObjectExists(
                f"object {manifest.name!r} is registered by somebody else, as version {theirs.version} of "
                f"{theirs.size} bytes, and differs from ours of {manifest.size} bytes: choose another name, or replace "
                "it by force=True"
            )
        return theirs

    def unregister(self, name: str) -> None:
        """Stop offering an object that was registered here; replicas elsewhere live on. Raises ObjectNotFound."""
        self._holdings.drop(name, seed=True)

    def delete_replica(self, name: str) -> None:
        """Stop offering an object that `get_replica` brought here; the memory stays the caller's. ObjectNotFound."""
        self._holdings.drop(name, seed=False)

    # --- for those who want one -----------------------------------------------------------------------------

    def get_replica(
        self,
        name: str,
        out: object = None,
        *,
        timeout: float | None = None,
        wait: float = 0.0,
        progress: OnProgress | None = None,
        byte_range: tuple[int, int] | None = None,
        cancel: threading.Event | None = None,
        have: Callable[[Manifest, list[Bytes]], Bits] | None = None,
        on_shard: Callable[[Manifest, int], object] | None = None,
    ) -> Replica:
        """Bring an object here, verified, and offer it to others while it comes and afterwards.

        `out` receives it: what `register` takes, of the object's sizes (a state dict in any order), or None to have
        memory allocated (which peers of this host can map: the fastest). `timeout` in seconds; `wait` seconds for an
        object that is not there yet. `byte_range` (begin, end) brings only that part, into `out` of that size, and is
        not offered. `have` says which shards are in memory already, `on_shard` is told of each new one. `cancel` ends
        the pull by TransferCancelled.

        An object that the original's P2P Store published is read as well, where there is none of ours: it cannot be
        verified (its manifest names the algorithm "none"), is not offered, and `have` and `on_shard` are not used.

        After an error the store is as before and the memory's content undefined. Raises ObjectNotFound,
        ObjectReplaced, SizeMismatch, IntegrityError, TransferTimeout, TransferCancelled, P2PError when the object is
        here already, ConfigError, RegistrationError, MetadataError.
        """
        check_name(name)
        deadline = None if timeout is None else time.monotonic() + timeout
        manifest = self._await(name, wait, deadline, cancel)
        if byte_range is not None:
            byte_range = as_range(byte_range, name)
        if isinstance(manifest, Checkpoint):
            return self._get_original(manifest, out, byte_range, deadline, cancel, progress)
        if byte_range is not None:
            return self._get_range(manifest, out, byte_range, deadline, cancel, progress)
        buffers, arrays = receivers(self.engine, manifest, out)
        held = Held(manifest, arrays, [], False, np.zeros(manifest.shards, bool), busy=True)
        self._holdings.add(name, held)
        try:
            if out is None:
                held.registered = [buffer for buffer in buffers if isinstance(buffer, np.ndarray)]
            else:
                self._holdings.register_memory(
                    held, [b for b, size in zip(buffers, manifest.sizes, strict=True) if size]
                )
            if have is not None:
                held.have[:] = have(manifest, arrays)
            result = self._pull(held, deadline, cancel, progress, on_shard)
        except BaseException:
            self._holdings.release(name, held)
            raise
        held.busy = False
        return Replica(manifest, arrays, result)

    def _look_up(self, name: str) -> Manifest | Checkpoint | None:
        """An object of ours, or else the original's."""
        return self._catalogue.current(name) or find(self._catalogue.store, name)

    def _await(
        self, name: str, wait: float, deadline: float | None, cancel: threading.Event | None
    ) -> Manifest | Checkpoint:
        manifest = self._look_up(name)
        if manifest is not None:
            return manifest
        end = time.monotonic() + wait if deadline is None else min(deadline, time.monotonic() + wait)
        there, looked = threading.Event(), time.monotonic()
        with self._catalogue.store.watch(self._catalogue.prefix(name) + CURRENT, lambda _: there.set()):
            while time.monotonic() < end and not (cancel is not None and cancel.is_set()):
                there.wait(min(0.1, max(0.0, end - time.monotonic())))
                if there.is_set() or time.monotonic() > looked + LOOK:
                    there.clear()
                    looked = time.monotonic()
                    with contextlib.suppress(MetadataUnavailable):
                        manifest = self._look_up(name)
                    if manifest is not None:
                        return manifest
        if cancel is not None and cancel.is_set():
            raise TransferCancelled(f"waiting for object {name!r} was cancelled")
        waited = f" within {wait:g} s" if wait else ""
        raise ObjectNotFound(f"nobody has registered an object {name!r} in {self._catalogue.store.spec}{waited}")

    def _pull(
        self,
        held: Held,
        deadline: float | None,
        cancel: threading.Event | None,
        progress: OnProgress | None,
        on_shard: Callable[[Manifest, int], object] | None,
    ) -> Progress:
        manifest = held.manifest

        def verified(shard: int) -> None:
            if on_shard is not None:
                on_shard(manifest, shard)
            held.have[shard] = True
            if held.announcer is not None:
                held.announcer.changed()

        wanted = np.ones(manifest.shards, bool)
        held.board = Board(self._holdings.boards.take(board_size(manifest.shards)), held.have)
        held.pull = Pull(
            self.engine,
            manifest,
            Memory(held.arrays),
            self._holdings.host,
            wanted,
            held.have,
            verified,
            self._copies,
            held.board,
        )
        self._holdings.offer(held)
        self._run(held, deadline, cancel, progress)
        assert held.announcer is not None
        result, held.pull = held.pull.progress, None
        held.announcer.changed()
        held.announcer.finish(LAST_WORDS)
        return result

    def _run(
        self, held: Held, deadline: float | None, cancel: threading.Event | None, progress: OnProgress | None
    ) -> None:
        assert held.pull is not None
        try:
            held.pull.run(deadline, cancel, progress, self._settings.lease_ttl / 2)
        except ObjectNotFound as error:
            if held.current not in (None, held.manifest.version):
                raise ObjectReplaced(f"{error}; {held.manifest.name!r} now is version {held.current}") from error
            raise

    def _get_original(
        self,
        checkpoint: Checkpoint,
        out: object,
        byte_range: tuple[int, int] | None,
        deadline: float | None,
        cancel: threading.Event | None,
        progress: OnProgress | None,
    ) -> Replica:
        """The original's object, or a range of it: not verified, and not offered to others."""
        manifest = checkpoint.manifest()
        begin, end = byte_range or (0, manifest.size)
        if byte_range is None:
            buffers, arrays = receivers(self.engine, manifest, out)
        else:
            arrays = [range_receiver(manifest, out, begin, end)]
            buffers = [*arrays]
        held = Held(manifest, arrays, [], False, np.ones(len(checkpoint.shards), bool), busy=True)
        self._holdings.add(manifest.name, held)
        try:
            if out is None and byte_range is None:
                held.registered = [buffer for buffer in buffers if isinstance(buffer, np.ndarray)]
            else:
                self._holdings.register_memory(held, [b for b, a in zip(buffers, arrays, strict=True) if a.nbytes])
            result = Fetch(self.engine, checkpoint, Memory(arrays, begin)).run(deadline, cancel, progress)
        except BaseException:
            self._holdings.release(manifest.name, held)
            raise
        if byte_range is not None:
            self._holdings.release(manifest.name, held)
        held.busy = False
        return Replica(manifest, arrays, result)

    def _get_range(
        self,
        manifest: Manifest,
        out: object,
        byte_range: tuple[int, int],
        deadline: float | None,
        cancel: threading.Event | None,
        progress: OnProgress | None,
    ) -> Replica:
        """Whole shards are pulled, since they are what can be verified; what of them is not asked for is let go."""
        begin, end = byte_range
        target = range_receiver(manifest, out, begin, end)
        first, last = begin // manifest.shard_size, -(-end // manifest.shard_size)
        wanted = np.zeros(manifest.shards, bool)
        wanted[first : last if end > begin else first] = True
        low, high = manifest.span(first)[0], max(end, manifest.span(last - 1)[1]) if end > begin else end
        head, tail = np.empty(begin - low, np.uint8), np.empty(high - end, np.uint8)
        pieces = [array for array in (head, target, tail) if array.nbytes]
        held = Held(manifest, [], pieces, False, np.zeros(manifest.shards, bool))
        self.engine.register_many(pieces, remote_accessible=False)
        try:
            memory = Memory([head, target, tail], low)
            held.pull = Pull(
                self.engine, manifest, memory, self._holdings.host, wanted, held.have, lambda _: None, self._copies
            )
            self._holdings.follow(held)
            self._run(held, deadline, cancel, progress)
            return Replica(manifest, [target], held.pull.progress)
        finally:
            self._holdings.let_go(held)

    # --- for all --------------------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Objects whose names begin with `prefix`, with their holders. Raises MetadataError."""
        return self._catalogue.list(prefix) + list_originals(self._catalogue.store, prefix)

    def holders(self, name: str) -> builtins.list[Holder]:
        """Records of the others that hold or pull the object which this store holds. Raises ObjectNotFound."""
        return [*self._holdings.find(name).records.values()]

    def wait_unused(self, name: str, quiet: float, timeout: float) -> bool:
        """Wait until for `quiet` seconds nobody has been pulling the object from here; False after `timeout` seconds.

        Raises ObjectNotFound.
        """
        held, end, since = self._holdings.find(name), time.monotonic() + timeout, time.monotonic()
        while (now := time.monotonic()) - since < quiet:
            if now > end:
                return False
            if any(self.name in holder.sources for holder in [*held.records.values()]):
                since = now
            time.sleep(min(0.05, quiet))
        return True

    def allocate(self, nbytes: int) -> Bytes:
        """Memory that peers of this host can map. It stays until the engine unregisters it, or is closed."""
        return self.engine.allocate(nbytes)

    def close(self) -> None:
        """Withdraw everything; peers that still pull from here go elsewhere. Idempotent; never raises."""
        self._holdings.close()
        self._stack.close()
        for pool in (self._holdings.boards, self._copies):
            pool.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
