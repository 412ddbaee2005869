"""What an object is: its version, the sizes of its buffers, its shards and their digests. Immutable once published.

An object is the concatenation of its buffers. A *shard* is `shard_size` consecutive bytes of it (the last one fewer),
whatever buffers they lie in: thousands of small tensors are as cheap to move as one large array.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mooncake_hpc.errors import ConfigError, MetadataError
from mooncake_hpc.p2p.digests import digest_size

FORMAT = 1
BUFFERS, TENSORS, FILE, FOLDER = "buffers", "tensors", "file", "folder"  # kinds
SMALLEST, LARGEST = 1 << 16, 64 << 20  # bytes: limits of a shard size that is chosen here
AIM = 256  # shards of an object, where the limits allow
UNVERIFIED = "none"  # in place of a digest algorithm, for the original's objects
LONGEST_NAME = 512  # bytes


@dataclass(frozen=True, slots=True)
class Part:
    """A named buffer: a tensor with dtype (numpy's `str`) and shape, or a file, whose name is its relative path.

    `mode` has a file's permission bits, 0 where they are unknown. A name that ends in a slash is an empty folder's.
    """

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    mode: int = field(default=0, compare=False)  # trainers with the same bytes have the same object


@dataclass(frozen=True, slots=True)
class Manifest:
    """`sizes` are the buffers' in bytes; `digests` are those of the shards, one after the other.

    `size` is the whole object's in bytes; `shards` their number, 0 for an object of 0 bytes.
    """

    name: str
    version: str
    sizes: tuple[int, ...]
    shard_size: int
    algorithm: str
    digests: bytes = field(repr=False)
    kind: str = BUFFERS
    parts: tuple[Part, ...] = ()
    size: int = field(init=False)
    shards: int = field(init=False)

    def __post_init__(self) -> None:
        size = sum(self.sizes)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "shards", -(-size // self.shard_size) if self.shard_size > 0 else 0)

    def span(self, shard: int) -> tuple[int, int]:
        """First byte of a shard in the object, and the one behind its last."""
        begin = shard * self.shard_size
        return begin, min(begin + self.shard_size, self.size)

    def digest(self, shard: int) -> bytes:
        length = len(self.digests) // self.shards
        return self.digests[shard * length : (shard + 1) * length]

    def same_content(self, other: Manifest) -> bool:
        """Whether both describe the same bytes in the same form, whatever their versions."""
        return self._content() == other._content()

    def _content(self) -> tuple[object, ...]:
        return self.name, self.sizes, self.shard_size, self.algorithm, self.digests, self.kind, self.parts

    def to_json(self) -> str:
        value: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "version": self.version,
            "sizes": self.sizes,
            "shard_size": self.shard_size,
            "algorithm": self.algorithm,
            "digests": base64.b64encode(self.digests).decode(),
            "kind": self.kind,
            "parts": [[part.name, part.dtype, part.shape, part.mode] for part in self.parts],
        }
        return json.dumps(value, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Parse and check. `where` names the source in the MetadataError of a value that is no manifest."""
        try:
            value = json.loads(text)
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']!r}, this program reads {FORMAT}")
            manifest = cls(
                name=str(value["name"]),
                version=str(value["version"]),
                sizes=tuple(int(size) for size in value["sizes"]),
                shard_size=int(value["shard_size"]),
                algorithm=str(value["algorithm"]),
                digests=base64.b64decode(value["digests"], validate=True),
                kind=str(value["kind"]),
                parts=tuple(
                    Part(str(name), str(dtype), tuple(int(length) for length in shape), int(mode))
                    for name, dtype, shape, mode in value["parts"]
                ),
            )
            manifest._check()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MetadataError(f"{where} holds no manifest: {error}") from error
        return manifest

    def _check(self) -> None:
        if self.shard_size <= 0 or any(size < 0 for size in self.sizes):
            raise ValueError("a size is below 0")
        if len(self.digests) != self.shards * digest_size(self.algorithm):
            raise ValueError(f"{len(self.digests)} bytes of {self.algorithm} digests for {self.shards} shards")
        if self.parts and len(self.parts) != len(self.sizes):
            raise ValueError(f"{len(self.parts)} names for {len(self.sizes)} buffers")


def new_version() -> str:
    """A random one: two trainers never choose the same."""
    return secrets.token_hex(8)


def choose_shard_size(size: int) -> int:
    """A power of 2 that cuts `size` bytes into about AIM shards."""
    aim = max(1, size // AIM)
    return min(LARGEST, max(SMALLEST, 1 << (aim - 1).bit_length()))


def check_name(name: str) -> None:
    """Raise ConfigError unless this can be an object's name: any text but the empty one, up to 512 bytes."""
    if not isinstance(name, str):
        raise ConfigError(f"an object's name is a text, not {name!r}")
    length = len(name.encode("utf-8", "surrogatepass"))
    if not 0 < length <= LONGEST_NAME:
        raise ConfigError(f"object name {name[:40]!r}… has {length} bytes: 1 to {LONGEST_NAME} are possible")


def by_name(parts: Sequence[Part], given: Mapping[str, Any]) -> list[Any]:
    """The given things in the order of `parts`. ConfigError names those that are missing or too many."""
    names = [part.name for part in parts]
    if missing := [name for name in names if name not in given]:
        raise ConfigError(f"the object has {missing[:3]} too, {len(missing)} names that were not given")
    if extra := given.keys() - set(names):
        raise ConfigError(f"the object has no {sorted(extra)[:3]} ({len(extra)} names)")
    return [given[name] for name in names]
