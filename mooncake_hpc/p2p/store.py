"""P2PStore: objects that one process registers and any number of others replicate from it and from one another."""

from __future__ import annotations

import builtins
import contextlib
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from mooncake_hpc.core import process
from mooncake_hpc.core.errors import ConfigError, MalformedRecord, ObjectExists, P2PError
from mooncake_hpc.core.names import check_name, check_text
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.engine.engine import TransferEngine
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.p2p.buffers import as_bytes, as_range, digest_all, take_apart
from mooncake_hpc.p2p.catalog import Catalogue, Holder, ObjectInfo
from mooncake_hpc.p2p.digests import DEFAULT
from mooncake_hpc.p2p.layout import Bytes, Memory
from mooncake_hpc.p2p.local_objects import Held, Holdings
from mooncake_hpc.p2p.manifest import LONGEST_PART_NAME, Manifest, Part, choose_shard_size, new_version
from mooncake_hpc.p2p.mooncake_payload import Checkpoint, list_originals
from mooncake_hpc.p2p.progress import OnProgress, Terms
from mooncake_hpc.p2p.replication import Have, OnShard, Replica, Replicator


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
        self._process = process.here
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
        self._replicator = Replicator(engine, self._catalogue, self._holdings, self._settings.lease_ttl / 2)

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

        Registering a name that this store has registered makes a new version of it. One that somebody else has
        registered, whether or not a replica is here, is ObjectExists, unless the content is equal (then this store
        becomes one more holder) or `force`. Raises ConfigError, RegistrationError, MetadataError.
        """
        process.check(self)
        check_name(name, "an object's name")
        buffers, found_kind, found_parts = take_apart(data)
        arrays = [as_bytes(buffer) for buffer in buffers]
        manifest = _describe(name, arrays, shard_size, algorithm, kind or found_kind, tuple(parts) or found_parts)
        before = self._holdings.get(name)
        if before is not None and before.busy:
            raise P2PError(f"object {name!r} is being pulled into this store")
        held = Held(manifest, arrays, [], True, np.ones(manifest.shards, bool))
        self._holdings.register_memory(held, [b for b, size in zip(buffers, manifest.sizes, strict=True) if size])
        try:
            manifest = self._publish(manifest, before is not None and self._means_ours(before), force)
            held.manifest = manifest
            self._holdings.offer(held)
        except BaseException:
            self._holdings.unregister_memory(held)
            raise
        held.registered += owned
        self._holdings.replace(name, held)
        return manifest

    def _means_ours(self, held: Held) -> bool:
        """Whether the name still means what was registered here: somebody may have put a newer version in its place."""
        try:
            current = self._catalogue.current(held.manifest.name)
        except MalformedRecord:  # of others, and no version of the object
            current = None
        return held.seed and (current is None or current.version == held.manifest.version)

    def _publish(self, manifest: Manifest, ours: bool, force: bool) -> Manifest:
        if self._catalogue.publish(manifest, ours, force):
            return manifest
        theirs = self._catalogue.current(manifest.name)
        if theirs is None:  # it went this moment
            return self._publish(manifest, ours, True)
        if not theirs.same_content(manifest):
            raise ObjectExists(
                f"object {manifest.name!r} is registered by somebody else, as version {theirs.version} of "
                f"{theirs.size} bytes, and differs from ours of {manifest.size} bytes: choose another name, or replace "
                "it (force=True, --force)"
            )
        return theirs

    def unregister(self, name: str) -> None:
        """Stop offering an object that was registered here; replicas elsewhere live on. Raises ObjectNotFound."""
        process.check(self)
        self._holdings.drop(name, seed=True)

    def delete_replica(self, name: str) -> None:
        """Stop offering an object that `get_replica` brought here; the memory stays the caller's. ObjectNotFound."""
        process.check(self)
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
        have: Have | None = None,
        on_shard: OnShard | None = None,
    ) -> Replica:
        """Bring an object here, verified, and offer it to others while it comes and afterwards.

        `out` receives it: what `register` takes, of the object's sizes (a state dict in any order), or None to have
        memory allocated (which peers of this host can map: the fastest). Tensors must have the dtype and shape that
        were published, or be flat arrays of bytes (uint8) of their sizes. `timeout` in seconds; `wait` seconds for an
        object that is not there yet. `byte_range` (begin, end) brings only that part, into `out` of that size, and is
        not offered. `have` says which shards are in memory already, `on_shard` is told of each new one. `cancel` ends
        the pull by TransferCancelled.

        An object that the original's P2P Store published is read as well, where there is none of ours: it cannot be
        verified (its manifest names the algorithm "none"), is not offered, and `have` and `on_shard` are not used.

        After an error the store is as before and the memory's content undefined. Raises ObjectNotFound,
        ObjectReplaced, SizeMismatch, IntegrityError, TransferTimeout, TransferCancelled, P2PError when the object is
        here already, ConfigError, RegistrationError, MetadataError.
        """
        process.check(self)
        check_name(name, "an object's name")
        terms = Terms(None if timeout is None else time.monotonic() + timeout, cancel, progress)
        manifest = self._replicator.find(name, wait, terms)
        if byte_range is not None:
            byte_range = as_range(byte_range, name)
        if isinstance(manifest, Checkpoint):
            return self._replicator.original(manifest, out, byte_range, terms)
        if byte_range is not None:
            return self._replicator.part(manifest, out, byte_range, terms)
        return self._replicator.whole(manifest, out, terms, have, on_shard)

    # --- for all --------------------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Objects whose names begin with `prefix`, with their holders. Raises MetadataError."""
        process.check(self)
        return self._catalogue.list(prefix) + list_originals(self._catalogue.store, prefix)

    def holders(self, name: str) -> builtins.list[Holder]:
        """Records of the others that hold or pull the object which this store holds. Raises ObjectNotFound."""
        process.check(self)
        return [*self._holdings.find(name).records.values()]

    def wait_unused(self, name: str, quiet: float, timeout: float) -> bool:
        """Wait until for `quiet` seconds nobody has been pulling the object from here; False after `timeout` seconds.

        Raises ObjectNotFound.
        """
        process.check(self)
        held, end, since = self._holdings.find(name), time.monotonic() + timeout, time.monotonic()
        while (now := time.monotonic()) - since < quiet:
            if now > end:
                return False
            if any(self.name in holder.sources for holder in [*held.records.values()]):
                since = now
            time.sleep(min(0.05, quiet))
        return True

    def allocate(self, nbytes: int) -> Bytes:
        """Memory that peers can read, and map on this host. It stays until the engine unregisters it, or is closed."""
        process.check(self)
        return self.engine.allocate(nbytes, writable_by_peers=False)

    def close(self) -> None:
        """Withdraw everything; peers that still pull from here go elsewhere. Idempotent; never raises.

        In a forked child nothing happens.
        """
        if self._process is not process.here:
            return
        self._holdings.close()
        self._stack.close()
        self._holdings.boards.clear()
        self._replicator.close()

    def __enter__(self) -> Self:
        process.check(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _describe(
    name: str, arrays: Sequence[Bytes], shard_size: int, algorithm: str, kind: str, parts: tuple[Part, ...]
) -> Manifest:
    """A new version of an object that consists of these bytes."""
    if not isinstance(shard_size, int | np.integer) or shard_size < 0:
        raise ConfigError(f"shard_size {shard_size!r} is no number of bytes")
    for part in parts:
        check_text(part.name, "the name of a tensor or file", LONGEST_PART_NAME)
    sizes = tuple(array.nbytes for array in arrays)
    shard = int(shard_size) or choose_shard_size(sum(sizes))
    digests = digest_all(Memory(arrays), shard, algorithm)
    return Manifest(name, new_version(), sizes, shard, algorithm, digests, kind, parts)
