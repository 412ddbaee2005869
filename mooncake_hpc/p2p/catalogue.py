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
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

import numpy as np

from mooncake_hpc.errors import MetadataError, MetadataUnavailable, MooncakeError, NameInUse
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.p2p.board import Place
from mooncake_hpc.p2p.holders import Bits
from mooncake_hpc.p2p.manifest import Manifest

log = logging.getLogger(__name__)

CURRENT = "current"
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
        bits = "all" if self.have.all() else base64.b64encode(np.packbits(self.have).tobytes()).decode()
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
    def from_json(cls, text: str, where: str) -> Holder:
        """Raises MetadataError, which names `where`, for a value that is no record."""
        try:
            value = json.loads(text)
            shards = int(value["shards"])
            if value["have"] == "all":
                have = np.ones(shards, bool)
            else:
                packed = np.frombuffer(base64.b64decode(value["have"], validate=True), np.uint8)
                have = np.unpackbits(packed, count=shards).astype(bool)
            if len(have) != shards:
                raise ValueError(f"{len(have)} bits for {shards} shards")
            return cls(
                segment=str(value["segment"]),
                generation=str(value["generation"]),
                host=str(value["host"]),
                bases=tuple(int(base) for base in value["bases"]),
                have=have,
                board=Place.of(value["board"]),
                sources=tuple(str(source) for source in value["sources"]),
                seed=bool(value["seed"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MetadataError(f"{where} holds no holder's record: {error!r}") from error


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
        self._root = "mooncake_hpc/p2p/" + (f"{cluster.rstrip('/')}/" if cluster else "")

    def prefix(self, name: str) -> str:
        """Where `current` and the holders of an object are."""
        return f"{self._root}object/{_quote(name)}/"

    def holder_key(self, manifest: Manifest, segment: str) -> str:
        return f"{self.prefix(manifest.name)}{manifest.version}/{_quote(segment)}"

    def split_key(self, key: str) -> tuple[str, str, str]:
        """Object, version and holder of a holder's key; version CURRENT and no holder for the other kind."""
        parts = key.removeprefix(f"{self._root}object/").split("/")
        return unquote(parts[0]), parts[1], unquote(parts[2]) if len(parts) > 2 else ""

    def current(self, name: str) -> Manifest | None:
        """The manifest of the version that the name means now; None where there is none. Raises MetadataError."""
        for _ in range(3):  # the version may be replaced between the two reads
            text = self.store.get(self.prefix(name) + CURRENT)
            if text is None:
                return None
            key = self._manifest_key(name, version_of(text))
            manifest = self.store.get(key)
            if manifest is not None:
                return Manifest.from_json(manifest, f"key {key!r} in {self.store.spec}")
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
        if text is not None and version_of(text) == manifest.version:
            self.store.withdraw(current)
        self.store.withdraw(self._manifest_key(manifest.name, manifest.version))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """The current versions of the objects whose names begin so, by name."""
        keys = self.store.list(f"{self._root}object/{_quote(prefix)}")
        found: dict[str, tuple[str, dict[str, object]]] = {}
        for key, text in keys.items():
            name, version, _ = self.split_key(key)
            if version == CURRENT:
                found[name] = version_of(text), json.loads(text)
        holders: dict[str, dict[str, int]] = {name: {} for name in found}
        for key, text in keys.items():
            name, version, segment = self.split_key(key)
            if segment and name in found and version == found[name][0]:
                holders[name][segment] = int(Holder.from_json(text, key).have.sum())
        return [
            ObjectInfo(name, version, holders=holders[name], **_numbers(value))  # type: ignore[arg-type]
            for name, (version, value) in sorted(found.items())
        ]

    def _manifest_key(self, name: str, version: str) -> str:
        return f"{self._root}manifest/{_quote(name)}/{version}"


def _quote(name: str) -> str:
    return quote(name, safe="", errors="surrogatepass")


def _summary(manifest: Manifest) -> str:
    sizes = manifest.sizes if len(manifest.sizes) <= 64 else (manifest.size,)
    value = {"version": manifest.version, "size": manifest.size, "shards": manifest.shards}
    return json.dumps({**value, "shard_size": manifest.shard_size, "sizes": sizes}, separators=(",", ":"))


def version_of(text: str) -> str:
    """The version in a value of `current`. Raises MetadataError."""
    try:
        return str(json.loads(text)["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise MetadataError(f"no object version in {text[:80]!r}: {error!r}") from error


def _numbers(value: Mapping[str, object]) -> dict[str, object]:
    numbers = {key: value[key] for key in ("size", "shards", "shard_size")}
    return {**numbers, "sizes": tuple(value["sizes"])}  # type: ignore[arg-type]


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
            with self._lock:
                if self._ending and not self._dirty.is_set():
                    return
                ending = self._ending
            if not ending:
                self._finishing.wait(max(QUICKEST, self._holders() ** 2 / EVENTS))
