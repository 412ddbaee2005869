"""What the metadata store says of objects: keys, records of holders, and their announcement.

    mooncake_hpc/p2p/[<cluster>/]manifest/<name>/<version>         the manifest, immutable
    mooncake_hpc/p2p/[<cluster>/]object/<name>/current             which version the name means, with sizes for listings
    mooncake_hpc/p2p/[<cluster>/]object/<name>/<version>/<holder>  one small record a holder

Names are percent-encoded, so that any text can be one. All keys are leased: a holder that dies takes its record with
it. Of the manifest and `current`, which hang on the lease of whoever put them, any holder puts new ones when they
vanish (`Catalogue.adopt`), so that an object lives for as long as its holders together have all of it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import add
from urllib.parse import quote, unquote

import numpy as np
from msgspec import Struct

from mooncake_hpc.core.decode import (
    LONGEST_SMALL_VALUE,
    Address,
    Count,
    Name,
    Positive,
    Reader,
    Text,
    check_range,
    reading,
    warn_once,
)
from mooncake_hpc.core.errors import MalformedRecord, MetadataUnavailable, MooncakeError, NameInUse
from mooncake_hpc.core.names import check_text
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.p2p.availability import Place, board_size
from mooncake_hpc.p2p.manifest import Manifest, Version
from mooncake_hpc.p2p.peer_state import Bits

log = logging.getLogger(__name__)

CURRENT = "current"
ALL = "all"  # in place of bits, for a holder of all shards
EVENTS = 5000.0  # a second: what all holders' announcements together may cost the store; each is told to every holder
QUICKEST = 0.25  # seconds between two announcements of a holder: boards tell of shards sooner
RETRY = (0.1, 1.0)  # seconds after an announcement that failed: at first, and at most


@dataclass(frozen=True, slots=True)
class Holder:
    """A holder's record. `bases` are addresses of the object's buffers in the segment, in the manifest's order.

    Where there is a `board`, it knows more than `have`. `sources` are segments that the holder is pulling from.
    """

    segment: str
    generation: str
    host: str
    bases: tuple[int, ...]
    have: Bits
    board: Place | None = None
    sources: tuple[str, ...] = ()
    seed: bool = False

    def to_json(self) -> str:
        bits = ALL if self.have.all() else base64.b64encode(np.packbits(self.have).tobytes()).decode()
        value = {
            "segment": self.segment,
            "generation": self.generation,
            "host": self.host,
            "bases": self.bases,
            "shards": len(self.have),
            "have": bits,
            "board": None if self.board is None else (self.board.address, self.board.token),
            "sources": self.sources,
            "seed": self.seed,
        }
        return json.dumps(value, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str, segment: str, manifest: Manifest) -> Holder:
        """The record of `segment`. Raises MalformedRecord, which names `where`, for a value that is none, or does not
        fit the manifest."""
        value = _record(text, where, segment, manifest.shards)
        with reading("holder's record", where):
            if len(value.bases) != len(manifest.sizes):
                raise ValueError(f"{len(value.bases)} addresses for {len(manifest.sizes)} buffers")
            check_range(max(map(add, value.bases, manifest.sizes), default=0), 0)  # thousands of tensors are usual
            board = Place(*value.board) if value.board else None
            have = np.ones(value.shards, bool) if value.have == ALL else _unpack(value)
            return cls(value.segment, value.generation, value.host, value.bases, have, board, value.sources, value.seed)


class _Holder(Struct):
    """As `Holder.to_json` writes it: what it has is ALL, or bits in base64."""

    segment: Name
    generation: Text
    host: Text
    bases: tuple[Address, ...]
    shards: Count
    have: str
    board: tuple[Address, Positive] | None
    sources: tuple[Name, ...]
    seed: bool

    def __post_init__(self) -> None:
        check_range(max(self.bases, default=0), 0)
        if self.board is not None:
            check_range(self.board[0], board_size(self.shards))


def _record(text: str, where: str, segment: str, shards: int) -> _Holder:
    """The record of `segment` for an object of so many shards. Raises MalformedRecord, which names `where`."""
    value = _read_holder(text, where)
    with reading("holder's record", where):
        if (value.segment, value.shards) != (segment, shards):
            raise ValueError(f"it is of {value.segment!r} and {value.shards} shards, not of {segment!r} and {shards}")
    return value


def _unpack(value: _Holder) -> Bits:
    """The bits that it lists, no more than its text has room for. Raises ValueError."""
    packed = np.frombuffer(base64.b64decode(value.have, validate=True), np.uint8)
    if len(packed) != -(-value.shards // 8):
        raise ValueError(f"{8 * len(packed)} bits for {value.shards} shards")
    return np.unpackbits(packed, count=value.shards).view(np.bool_)


class _Current(Struct):
    """A value of `current`."""

    version: Version
    size: Count
    shards: Count
    shard_size: Positive
    sizes: tuple[Count, ...]

    def __post_init__(self) -> None:
        if self.shards != -(-self.size // self.shard_size) or self.size != sum(self.sizes):
            raise ValueError("its sizes contradict one another")


_read_holder = Reader(_Holder, "holder's record")
_read_current = Reader(_Current, "version of an object", LONGEST_SMALL_VALUE)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as `P2PStore.list` shows it: bytes, shards, and by holder the shards it has."""

    name: str
    version: str
    size: int
    shards: int
    shard_size: int
    sizes: tuple[int, ...]
    holders: Mapping[str, int]

    @property
    def replicas(self) -> int:
        """Holders of all of it."""
        return sum(have == self.shards for have in self.holders.values())


class Catalogue:
    """All objects in one metadata store. Thread-safe."""

    def __init__(self, store: MetadataStore, cluster: str) -> None:
        self.store = store
        check_text(cluster, "MC_METADATA_CLUSTER_ID")
        self._root = "mooncake_hpc/p2p/" + (f"{cluster.rstrip('/')}/" if cluster else "")

    def prefix(self, name: str) -> str:
        """Where `current` and the holders of an object are."""
        return f"{self._root}object/{_quote(name)}/"

    def holder_key(self, manifest: Manifest, segment: str) -> str:
        return f"{self.prefix(manifest.name)}{manifest.version}/{_quote(segment)}"

    def split_key(self, key: str) -> tuple[str, str, str]:
        """Object, version and holder of a holder's key; version CURRENT and no holder for the other kind.

        Raises MalformedRecord for a key that none of us makes.
        """
        try:
            name, version, *segment = key.removeprefix(f"{self._root}object/").split("/")
            parts = [unquote(part, errors="strict") for part in (name, *segment)]
            if [_quote(part) for part in parts] == [name, *segment] and len(parts) == 1 + (version != CURRENT):
                return parts[0], version, "".join(parts[1:])
        except ValueError:  # UnicodeDecodeError is one
            pass
        raise MalformedRecord(f"key {key!r} in {self.store.spec} is not one of an object's")

    def current(self, name: str) -> Manifest | None:
        """The manifest of the version that the name means now; None where there is none.

        Raises MalformedRecord, MetadataUnavailable.
        """
        for _ in range(3):  # the version may be replaced between the two reads
            text = self.store.get(self.prefix(name) + CURRENT)
            if text is None:
                return None
            version = version_of(text, self._where(self.prefix(name) + CURRENT))
            key = self._manifest_key(name, version)
            found = self.store.get(key)
            if found is not None:
                manifest = Manifest.from_json(found, self._where(key))
                if (manifest.name, manifest.version) != (name, version):
                    raise MalformedRecord(f"{self._where(key)} holds no manifest of it, but of {manifest.name!r}")
                return manifest
        return None

    def publish(self, manifest: Manifest, ours: bool, force: bool) -> bool:
        """Make the manifest the one that its name means, in place of `ours` or, by `force`, of anybody's.

        False where somebody else's has the name.
        """
        key = self._manifest_key(manifest.name, manifest.version)
        current, summary = self.prefix(manifest.name) + CURRENT, _summary(manifest)
        self.store.publish(key, manifest.to_json())
        done = True
        try:
            if ours or force:
                self.store.publish(current, summary)
            else:
                done = self.store.create(current, summary)
        except NameInUse:  # somebody has replaced ours
            done = force
            if force:
                self.store.withdraw(current)
                self.store.publish(current, summary)
        if not done:
            self.store.withdraw(key)
        return done

    def adopt(self, manifest: Manifest) -> None:
        """Put manifest and `current` where their holder took them along. Raises MetadataError."""
        key = self._manifest_key(manifest.name, manifest.version)
        self.store.create(key, manifest.to_json())
        self.store.create(self.prefix(manifest.name) + CURRENT, _summary(manifest))

    def withdraw(self, manifest: Manifest) -> None:
        """Remove what hangs on our lease of `publish` or `adopt`."""
        current = self.prefix(manifest.name) + CURRENT
        text = self.store.get(current)
        with contextlib.suppress(MalformedRecord):  # somebody else's
            if text is not None and version_of(text, current) == manifest.version:
                self.store.withdraw(current)
        self.store.withdraw(self._manifest_key(manifest.name, manifest.version))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """The current versions of the objects whose names begin so, by name. Malformed entries are left out."""
        check_text(prefix, "the beginning of an object's name")
        current: dict[str, _Current] = {}
        records: list[tuple[str, str, str, str, str]] = []
        for key, text in self.store.list(f"{self._root}object/{_quote(prefix)}").items():
            try:
                name, version, segment = self.split_key(key)
                if version == CURRENT:
                    current[name] = _read_current(text, self._where(key))
                else:
                    records.append((name, version, segment, key, text))
            except MalformedRecord as error:
                warn_once(log, error)
        holders: dict[str, dict[str, int]] = {name: {} for name in current}
        for name, version, segment, key, text in records:
            if name in current and version == current[name].version:
                try:
                    holders[name][segment] = _count(text, self._where(key), segment, current[name].shards)
                except MalformedRecord as error:
                    warn_once(log, error)
        return [
            ObjectInfo(name, one.version, one.size, one.shards, one.shard_size, one.sizes, holders[name])
            for name, one in sorted(current.items())
        ]

    def _where(self, key: str) -> str:
        return f"key {key!r} in {self.store.spec}"

    def _manifest_key(self, name: str, version: str) -> str:
        return f"{self._root}manifest/{_quote(name)}/{version}"


def _quote(name: str) -> str:
    return quote(name, safe="")


def _summary(manifest: Manifest) -> str:
    sizes = manifest.sizes if len(manifest.sizes) <= 64 else (manifest.size,)
    value = {"version": manifest.version, "size": manifest.size, "shards": manifest.shards}
    return json.dumps({**value, "shard_size": manifest.shard_size, "sizes": sizes}, separators=(",", ":"))


def version_of(text: str, where: str) -> str:
    """The version in a value of `current`. Raises MalformedRecord, which names `where`."""
    return _read_current(text, where).version


def _count(text: str, where: str, segment: str, shards: int) -> int:
    """How many of an object's shards the record of `segment` says are there. Raises MalformedRecord."""
    value = _record(text, where, segment, shards)
    with reading("holder's record", where):
        return shards if value.have == ALL else int(_unpack(value).sum())


class Announcer:
    """Keeps our record of one object up to date: `changed` is quick, a thread writes, bounded in writes a second.

    The store's absence delays announcements and loses none: each says all.
    """

    def __init__(
        self, store: MetadataStore, key: str, record: Callable[[], Holder], holders: Callable[[], int]
    ) -> None:
        """`record` makes the present record; `holders` counts them all. Publishes the first record; MetadataError."""
        self._store, self._key, self._record, self._holders = store, key, record, holders
        self._dirty, self._finishing, self._ending = threading.Event(), threading.Event(), False
        self._lock = threading.Lock()
        self.writes = 1
        store.publish(key, record().to_json())
        self._thread = threading.Thread(target=self._run, name="mooncake-announce", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """The record differs from what was published."""
        self._dirty.set()

    def finish(self, timeout: float) -> None:
        """Publish what has changed, within `timeout` seconds, and end the thread. Later `changed` do nothing."""
        with self._lock:
            self._ending = True
        self._finishing.set()
        self._dirty.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        pause = RETRY[0]
        while True:
            self._dirty.wait()
            self._dirty.clear()
            try:
                self._store.publish(self._key, self._record().to_json())
                self.writes += 1
                pause = RETRY[0]
            except NameInUse as error:
                log.warning("%s", error)
                return
            except MetadataUnavailable:
                self._dirty.set()
                time.sleep(pause)
                pause = min(2 * pause, RETRY[1])
                continue
            except MooncakeError as error:
                if not self._ending:
                    log.warning("record %s: %s", self._key, error)
                return
            except Exception:
                log.exception("record %s", self._key)
                return
            with self._lock:
                if self._ending and not self._dirty.is_set():
                    return
                ending = self._ending
            if not ending:
                self._finishing.wait(max(QUICKEST, self._holders() ** 2 / EVENTS))
