"""P2PStore: objects that one process registers and any number of others replicate from it and from one another."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mooncake_hpc.engine import TransferEngine
from mooncake_hpc.errors import (
    ConfigError,
    MetadataError,
    MetadataUnavailable,
    MooncakeError,
    ObjectExists,
    ObjectNotFound,
    ObjectReplaced,
    P2PError,
    SizeMismatch,
    TransferCancelled,
)
from mooncake_hpc.memory import containing, describe
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.metadata.watch import Changes, Watch
from mooncake_hpc.p2p.board import Board, MemoryPool, board_size
from mooncake_hpc.p2p.buffers import as_bytes, as_range, digest_all, some, take_apart
from mooncake_hpc.p2p.catalogue import CURRENT, Announcer, Catalogue, Holder, ObjectInfo, version_of
from mooncake_hpc.p2p.digests import DEFAULT
from mooncake_hpc.p2p.layout import Memory
from mooncake_hpc.p2p.manifest import (
    TENSORS,
    Manifest,
    Part,
    by_name,
    check_name,
    choose_shard_size,
    new_version,
)
from mooncake_hpc.p2p.pull import OnProgress, Progress, Pull
from mooncake_hpc.p2p.swarm import Bits
from mooncake_hpc.p2p.upstream import Checkpoint, Fetch, find, list_originals
from mooncake_hpc.settings import Settings

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
LOOK = 1.0  # seconds between two looks for an object of the original's
LAST_WORDS = 2.0  # seconds for the last announcement of a pull; it goes on in the background


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


@dataclass(slots=True, eq=False)
class _Held:
    """An object, or as much of it as is there, that this store serves."""

    manifest: Manifest
    arrays: list[Bytes]
    registered: list[Bytes]  # what was registered for it alone
    seed: bool
    have: Bits
    board: Board | None = None  # while a pull is under way, and as long as others may look at it
    pull: Pull | None = None
    announcer: Announcer | None = None
    watch: Watch | None = None
    records: dict[str, Holder] = field(default_factory=dict)  # of the others
    current: str | None = None  # the version that the name means
    settled: threading.Event = field(default_factory=threading.Event)  # the first look at the catalogue is done
    busy: bool = False  # a pull is under way


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
        self._lock = threading.RLock()
        self._held: dict[str, _Held] = {}
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
        self._boards, self._copies = MemoryPool(engine, True), MemoryPool(engine, False)
        self._catalogue = Catalogue(store, self._settings.metadata_cluster_id)
        self._host = host_identity()

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
        with self._lock:
            before = self._held.get(name)
            if before is not None and before.busy:
                raise P2PError(f"object {name!r} is being pulled into this store")
        held = _Held(manifest, arrays, [], True, np.ones(manifest.shards, bool))
        self._register_memory(held, [buffer for buffer, size in zip(buffers, sizes, strict=True) if size])
        try:
            manifest = self._publish(manifest, force or before is not None)
            held.manifest = manifest
            self._offer(held)
        except BaseException:
            self._unregister_memory(held)
            raise
        held.registered += owned
        with self._lock:
            self._held[name] = held
        if before is not None:
            self._let_go(before)
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
        self._drop(name, seed=True)

    def delete_replica(self, name: str) -> None:
        """Stop offering an object that `get_replica` brought here; the memory stays the caller's. ObjectNotFound."""
        self._drop(name, seed=False)

    def _drop(self, name: str, seed: bool) -> None:
        with self._lock:
            held = self._held.get(name)
            if held is None or held.busy or held.seed != seed:
                what = "registered" if seed else "replicated"
                raise ObjectNotFound(f"object {name!r} was not {what} by {self.name!r}, or not wholly yet")
            del self._held[name]
        self._let_go(held)

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
        buffers, arrays = self._receivers(manifest, out)
        held = _Held(manifest, arrays, [], False, np.zeros(manifest.shards, bool), busy=True)
        self._hold(name, held)
        try:
            if out is None:
                held.registered = [buffer for buffer in buffers if isinstance(buffer, np.ndarray)]
            else:
                self._register_memory(held, [b for b, size in zip(buffers, manifest.sizes, strict=True) if size])
            if have is not None:
                held.have[:] = have(manifest, arrays)
            result = self._pull(held, deadline, cancel, progress, on_shard)
        except BaseException:
            self._release(name, held)
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

    def _receivers(self, manifest: Manifest, out: object) -> tuple[list[object], list[Bytes]]:
        """The buffers to receive the object, and as bytes. Raises SizeMismatch."""
        if out is None:
            if not manifest.size:
                return [], [np.zeros(0, np.uint8) for _ in manifest.sizes]
            whole = self.engine.allocate(manifest.size)
            return [whole], np.split(whole, np.cumsum(manifest.sizes)[:-1])
        if isinstance(out, Mapping):
            if manifest.kind != TENSORS:
                raise SizeMismatch(f"object {manifest.name!r} consists of {manifest.kind}, not of named tensors")
            buffers = by_name(manifest.parts, out)
        else:
            buffers, _, _ = take_apart(out)
        arrays = [as_bytes(buffer, write=True) for buffer in buffers]
        sizes = tuple(array.nbytes for array in arrays)
        if sizes != manifest.sizes:
            raise SizeMismatch(
                f"object {manifest.name!r} has {len(manifest.sizes)} buffers of {some(manifest.sizes)} bytes, but "
                f"{len(sizes)} of {some(sizes)} were given"
            )
        return buffers, arrays

    def _pull(
        self,
        held: _Held,
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
        held.board = Board(self._boards.take(board_size(manifest.shards)), held.have)
        held.pull = Pull(
            self.engine,
            manifest,
            Memory(held.arrays),
            self._host,
            wanted,
            held.have,
            verified,
            self._copies,
            held.board,
        )
        self._offer(held)
        self._run(held, deadline, cancel, progress)
        assert held.announcer is not None
        result, held.pull = held.pull.progress, None
        held.announcer.changed()
        held.announcer.finish(LAST_WORDS)
        return result

    def _run(
        self, held: _Held, deadline: float | None, cancel: threading.Event | None, progress: OnProgress | None
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
            buffers, arrays = self._receivers(manifest, out)
        else:
            arrays = [self._range_receiver(manifest, out, begin, end)]
            buffers = [*arrays]
        held = _Held(manifest, arrays, [], False, np.ones(len(checkpoint.shards), bool), busy=True)
        self._hold(manifest.name, held)
        try:
            if out is None and byte_range is None:
                held.registered = [buffer for buffer in buffers if isinstance(buffer, np.ndarray)]
            else:
                self._register_memory(held, [b for b, a in zip(buffers, arrays, strict=True) if a.nbytes])
            result = Fetch(self.engine, checkpoint, Memory(arrays, begin)).run(deadline, cancel, progress)
        except BaseException:
            self._release(manifest.name, held)
            raise
        if byte_range is not None:
            self._release(manifest.name, held)
        held.busy = False
        return Replica(manifest, arrays, result)

    def _hold(self, name: str, held: _Held) -> None:
        with self._lock:
            if name in self._held:
                raise P2PError(f"object {name!r} is held by {self.name!r} already: delete_replica() it first")
            self._held[name] = held

    def _release(self, name: str, held: _Held) -> None:
        with self._lock:
            del self._held[name]
        self._let_go(held)

    def _range_receiver(self, manifest: Manifest, out: object, begin: int, end: int) -> Bytes:
        """Where bytes `begin` to `end` of the object go. Raises SizeMismatch."""
        if not 0 <= begin <= end <= manifest.size:
            raise SizeMismatch(
                f"object {manifest.name!r} has {manifest.size} bytes: there is no range {begin} to {end}"
            )
        target = as_bytes(out, write=True) if out is not None else np.empty(end - begin, np.uint8)
        if target.nbytes != end - begin:
            raise SizeMismatch(f"a range of {end - begin} bytes does not fit a buffer of {target.nbytes}")
        return target

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
        target = self._range_receiver(manifest, out, begin, end)
        first, last = begin // manifest.shard_size, -(-end // manifest.shard_size)
        wanted = np.zeros(manifest.shards, bool)
        wanted[first : last if end > begin else first] = True
        low, high = manifest.span(first)[0], max(end, manifest.span(last - 1)[1]) if end > begin else end
        head, tail = np.empty(begin - low, np.uint8), np.empty(high - end, np.uint8)
        pieces = [array for array in (head, target, tail) if array.nbytes]
        held = _Held(manifest, [], pieces, False, np.zeros(manifest.shards, bool))
        self.engine.register_many(pieces, remote_accessible=False)
        try:
            memory = Memory([head, target, tail], low)
            held.pull = Pull(self.engine, manifest, memory, self._host, wanted, held.have, lambda _: None, self._copies)
            self._follow(held)
            self._run(held, deadline, cancel, progress)
            return Replica(manifest, [target], held.pull.progress)
        finally:
            self._let_go(held)

    # --- for all --------------------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Objects whose names begin with `prefix`, with their holders. Raises MetadataError."""
        return self._catalogue.list(prefix) + list_originals(self._catalogue.store, prefix)

    def holders(self, name: str) -> builtins.list[Holder]:
        """Records of the others that hold or pull the object which this store holds. Raises ObjectNotFound."""
        return [*self._find(name).records.values()]

    def wait_unused(self, name: str, quiet: float, timeout: float) -> bool:
        """Wait until for `quiet` seconds nobody has been pulling the object from here; False after `timeout` seconds.

        Raises ObjectNotFound.
        """
        held, end, since = self._find(name), time.monotonic() + timeout, time.monotonic()
        while (now := time.monotonic()) - since < quiet:
            if now > end:
                return False
            if any(self.name in holder.sources for holder in [*held.records.values()]):
                since = now
            time.sleep(min(0.05, quiet))
        return True

    def _find(self, name: str) -> _Held:
        with self._lock:
            held = self._held.get(name)
        if held is None:
            raise ObjectNotFound(f"object {name!r} is not held by {self.name!r}")
        return held

    def allocate(self, nbytes: int) -> Bytes:
        """Memory that peers of this host can map. It stays until the engine unregisters it, or is closed."""
        return self.engine.allocate(nbytes)

    def close(self) -> None:
        """Withdraw everything; peers that still pull from here go elsewhere. Idempotent; never raises."""
        with self._lock:
            held, self._held = [*self._held.values()], {}
        for one in held:
            try:
                self._let_go(one)
            except MooncakeError as error:
                log.warning("closing: %s", error)
        self._stack.close()
        for pool in (self._boards, self._copies):
            pool.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ---------------------------------------------------------------------------------------------

    def _register_memory(self, held: _Held, buffers: Sequence[object]) -> None:
        """Register what does not lie in memory that `allocate` made, which is registered."""
        fresh = []
        for buffer in buffers:
            view = describe(buffer)
            if containing(view.address, view.nbytes) is None:
                fresh.append(buffer)
        self.engine.register_many(fresh)
        held.registered = [as_bytes(buffer) for buffer in fresh]

    def _unregister_memory(self, held: _Held) -> None:
        registered, held.registered = held.registered, []
        if registered:
            self.engine.unregister_many(registered)

    def _offer(self, held: _Held) -> None:
        """Publish our record, and follow the others'."""
        key = self._catalogue.holder_key(held.manifest, self.name)
        held.announcer = Announcer(
            self._catalogue.store, key, lambda: self._record(held), lambda: len(held.records) + 1
        )
        self._follow(held)
        if held.seed:
            held.announcer.finish(0.0)

    def _record(self, held: _Held) -> Holder:
        bases = tuple(int(array.ctypes.data) if array.nbytes else 0 for array in held.arrays)
        pull, board = held.pull, held.board
        sources: tuple[str, ...] = ()
        if pull is not None:
            with pull.lock:
                sources = tuple(pull.swarm.fetching())
        return Holder(
            self.name,
            self.engine.generation,
            self._host,
            bases,
            held.have.copy(),
            None if board is None else board.place,
            sources,
            held.seed,
        )

    def _follow(self, held: _Held) -> None:
        held.watch = self._catalogue.store.watch(
            self._catalogue.prefix(held.manifest.name), lambda changes: self._changed(held, changes)
        )

    def _changed(self, held: _Held, changes: Changes) -> None:
        """The catalogue says something new of an object that we hold or pull."""
        for key, text in changes.items():
            _, version, segment = self._catalogue.split_key(key)
            if version == CURRENT:
                held.current = None if text is None else version_of(text)
            elif version == held.manifest.version and segment != self.name:
                self._record_changed(held, key, segment, text)
        held.settled.set()
        if held.current is None and not held.busy:
            self._adopt(held)

    def _record_changed(self, held: _Held, key: str, segment: str, text: str | None) -> None:
        if text is None:
            held.records.pop(segment, None)
            if held.pull is not None:
                held.pull.forget(segment)
            return
        try:
            holder = Holder.from_json(text, key)
        except MetadataError as error:
            log.warning("%s", error)
            return
        held.records[segment] = holder
        if held.pull is not None:
            held.pull.see(holder)

    def _adopt(self, held: _Held) -> None:
        """The process that published the object has gone: whoever is left keeps it alive."""
        with self._lock:
            if self._held.get(held.manifest.name) is not held or not held.have.all():
                return
        try:
            self._catalogue.adopt(held.manifest)
        except MooncakeError as error:
            log.warning("object %r: cannot keep it alive: %s", held.manifest.name, error)

    def _let_go(self, held: _Held) -> None:
        """Withdraw our record and what else is ours; on return nobody reads the memory any more."""
        if held.watch is not None:
            held.watch.close()
        if held.announcer is not None:
            held.announcer.finish(LAST_WORDS)
            try:
                self._catalogue.store.withdraw(self._catalogue.holder_key(held.manifest, self.name))
                self._catalogue.withdraw(held.manifest)
            except MetadataError as error:
                log.warning("object %r: records stay until our lease ends: %s", held.manifest.name, error)
        if held.board is not None:
            self._boards.give(held.board.memory)
        self._unregister_memory(held)


def host_identity() -> str:
    """Equal for processes that can map each other's memory: same machine, network namespace and user."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    text = f"{boot} {os.readlink('/proc/self/ns/net')} {os.getuid()}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
