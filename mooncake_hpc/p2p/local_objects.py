"""What a store holds, and how the catalogue and the others get to know of it."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.decode import warn_once
from mooncake_hpc.core.errors import MalformedRecord, MetadataError, MooncakeError, ObjectNotFound, P2PError
from mooncake_hpc.core.memory import containing, describe
from mooncake_hpc.engine.engine import TransferEngine
from mooncake_hpc.metadata.watch import Changes, Watch
from mooncake_hpc.p2p.availability import Board, MemoryPool
from mooncake_hpc.p2p.buffers import as_bytes
from mooncake_hpc.p2p.catalog import CURRENT, Announcer, Catalogue, Holder, version_of
from mooncake_hpc.p2p.download import Pull
from mooncake_hpc.p2p.manifest import Manifest
from mooncake_hpc.p2p.peer_state import Bits

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
UNREADABLE = "?"  # in place of the version that a malformed value of `current` means
LAST_WORDS = 2.0  # seconds for the last announcement of a pull; it goes on in the background


@dataclass(slots=True, eq=False)
class Held:
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


class Holdings:
    """All that one store holds, by the object's name. Thread-safe."""

    def __init__(self, engine: TransferEngine, catalogue: Catalogue) -> None:
        self._engine, self._catalogue = engine, catalogue
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}
        self.host = host_identity()
        self.boards = MemoryPool(engine, True)

    def get(self, name: str) -> Held | None:
        with self._lock:
            return self._held.get(name)

    def find(self, name: str) -> Held:
        """Raises ObjectNotFound."""
        held = self.get(name)
        if held is None:
            raise ObjectNotFound(f"object {name!r} is not held by {self._engine.name!r}")
        return held

    def add(self, name: str, held: Held) -> None:
        """Raises P2PError when an object of this name is here already."""
        with self._lock:
            if name in self._held:
                raise P2PError(f"object {name!r} is held by {self._engine.name!r} already: delete_replica() it first")
            self._held[name] = held

    def release(self, name: str, held: Held) -> None:
        """It is held no longer."""
        with self._lock:
            del self._held[name]
        self.let_go(held)

    def replace(self, name: str, held: Held) -> None:
        """From now on this is what the name means here; what it meant is let go."""
        with self._lock:
            before, self._held[name] = self._held.get(name), held
        if before is not None:
            self.let_go(before)

    def drop(self, name: str, seed: bool) -> None:
        """Let go of an object that was registered here (`seed`), or replicated. Raises ObjectNotFound."""
        with self._lock:
            held = self._held.get(name)
            if held is None or held.busy or held.seed != seed:
                what = "registered" if seed else "replicated"
                raise ObjectNotFound(f"object {name!r} was not {what} by {self._engine.name!r}, or not wholly yet")
            del self._held[name]
        self.let_go(held)

    def close(self) -> None:
        """Let go of everything. Never raises."""
        with self._lock:
            held, self._held = [*self._held.values()], {}
        for one in held:
            try:
                self.let_go(one)
            except MooncakeError as error:
                log.warning("closing: %s", error)

    # --- one object ------------------------------------------------------------------------------------------

    def register_memory(self, held: Held, buffers: Sequence[object]) -> None:
        """Register what does not lie in memory that `allocate` made, which is registered."""
        fresh = []
        for buffer in buffers:
            view = describe(buffer)
            if containing(view.address, view.nbytes) is None:
                fresh.append(buffer)
        self._engine.register_many(fresh, writable_by_peers=False)
        held.registered = [as_bytes(buffer) for buffer in fresh]

    def unregister_memory(self, held: Held) -> None:
        registered, held.registered = held.registered, []
        if registered:
            self._engine.unregister_many(registered)

    def offer(self, held: Held) -> None:
        """Publish our record, and follow the others'."""
        key = self._catalogue.holder_key(held.manifest, self._engine.name)
        held.announcer = Announcer(
            self._catalogue.store, key, lambda: self._record(held), lambda: len(held.records) + 1
        )
        self.follow(held)
        if held.seed:
            held.announcer.finish(0.0)

    def _record(self, held: Held) -> Holder:
        bases = tuple(int(array.ctypes.data) if array.nbytes else 0 for array in held.arrays)
        pull, board = held.pull, held.board
        sources: tuple[str, ...] = ()
        if pull is not None:
            with pull.lock:
                sources = tuple(pull.swarm.fetching())
        return Holder(
            self._engine.name,
            self._engine.generation,
            self.host,
            bases,
            held.have.copy(),
            None if board is None else board.place,
            sources,
            held.seed,
        )

    def follow(self, held: Held) -> None:
        held.watch = self._catalogue.store.watch(
            self._catalogue.prefix(held.manifest.name), lambda changes: self._changed(held, changes)
        )

    def _changed(self, held: Held, changes: Changes) -> None:
        """The catalogue says something new of an object that we hold or pull."""
        for key, text in changes.items():
            try:
                _, version, segment = self._catalogue.split_key(key)
                if version == CURRENT:
                    held.current = UNREADABLE
                    held.current = None if text is None else version_of(text, f"key {key!r}")
                elif version == held.manifest.version and segment != self._engine.name:
                    self._record_changed(held, key, segment, text)
            except MalformedRecord as error:
                warn_once(log, error)
        held.settled.set()
        if held.current is None and not held.busy:
            self._adopt(held)

    def _record_changed(self, held: Held, key: str, segment: str, text: str | None) -> None:
        """Raises MalformedRecord; what was known of the holder stays then."""
        if text is None:
            held.records.pop(segment, None)
            if held.pull is not None:
                held.pull.forget(segment)
            return
        holder = Holder.from_json(text, f"key {key!r}", segment, held.manifest)
        held.records[segment] = holder
        if held.pull is not None:
            held.pull.see(holder)

    def _adopt(self, held: Held) -> None:
        """The process that published the object has gone: whoever is left keeps it alive."""
        with self._lock:
            if self._held.get(held.manifest.name) is not held or not held.have.all():
                return
        try:
            self._catalogue.adopt(held.manifest)
        except MooncakeError as error:
            log.warning("object %r: cannot keep it alive: %s", held.manifest.name, error)

    def let_go(self, held: Held) -> None:
        """Withdraw our record and what else is ours; on return nobody reads the memory any more."""
        if held.watch is not None:
            held.watch.close()
        if held.announcer is not None:
            held.announcer.finish(LAST_WORDS)
            try:
                self._catalogue.store.withdraw(self._catalogue.holder_key(held.manifest, self._engine.name))
                self._catalogue.withdraw(held.manifest)
            except MetadataError as error:
                log.warning("object %r: records stay until our lease ends: %s", held.manifest.name, error)
        if held.board is not None:
            self.boards.give(held.board.memory)
        self.unregister_memory(held)


def host_identity() -> str:
    """Equal for processes that can map each other's memory: same machine, network namespace and user."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    text = f"{boot} {os.readlink('/proc/self/ns/net')} {os.getuid()}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
