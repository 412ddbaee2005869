"""What an object is: its version, the sizes of its buffers, its shards and their digests. Immutable once published.

An object is the concatenation of its buffers. A *shard* is `shard_size` consecutive bytes of it (the last one fewer),
whatever buffers they lie in: thousands of small tensors are as cheap to move as one large array.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from mooncake_hpc.core.decode import Count, Name, Positive, Reader, Text, reading
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.p2p.digests import digest_size

FORMAT = 1
BUFFERS, TENSORS, FILE, FOLDER = "buffers", "tensors", "file", "folder"  # kinds
SMALLEST, LARGEST = 1 << 16, 64 << 20  # bytes: limits of a shard size that is chosen here
AIM = 256  # shards of an object, where the limits allow
UNVERIFIED = "none"  # in place of a digest algorithm, for the original's objects
LARGEST_OBJECT = 1 << 62  # bytes
LONGEST_PART_NAME = 4096  # bytes, as the longest path
DTYPE = re.compile(r"[<>|=]?\w{1,32}(\[\w{1,16}\])?")  # of one plain element; numpy's language can say far more

Version = Annotated[str, Meta(pattern=r"^[\w.-]{1,64}$")]
_PartName = Annotated[str, Meta(max_length=LONGEST_PART_NAME)]
_Shape = Annotated[tuple[Count, ...], Meta(max_length=64)]
_Mode = Annotated[int, Meta(ge=0, le=0o7777)]


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
        """Parse and check. `where` names the source in the MalformedRecord of a value that is no manifest."""
        value = _read(text, where)
        with reading("manifest", where):
            manifest = cls(
                name=value.name,
                version=value.version,
                sizes=value.sizes,
                shard_size=value.shard_size,
                algorithm=value.algorithm,
                digests=base64.b64decode(value.digests, validate=True),
                kind=value.kind,
                parts=tuple(Part(*part) for part in value.parts),
            )
            manifest._check()
            return manifest

    def _check(self) -> None:
        """Raise ValueError where the numbers contradict one another. Allocates nothing by what they claim."""
        if self.size >= LARGEST_OBJECT:
            raise ValueError(f"an object of {self.size} bytes")
        if len(self.digests) != self.shards * digest_size(self.algorithm):
            raise ValueError(f"{len(self.digests)} bytes of {self.algorithm} digests for {self.shards} shards")
        if self.parts and len(self.parts) != len(self.sizes):
            raise ValueError(f"{len(self.parts)} names for {len(self.sizes)} buffers")
        if len({part.name for part in self.parts}) != len(self.parts):
            raise ValueError("two parts have one name")
        if self.kind == TENSORS:
            for part, size in zip(self.parts, self.sizes, strict=True):
                _check_tensor(part, size)


class _Manifest(Struct):
    """As `Manifest.to_json` writes it. A part is name, dtype, shape and mode."""

    format: int
    name: Name
    version: Version
    sizes: tuple[Count, ...]
    shard_size: Positive
    algorithm: Text
    digests: str
    kind: Text
    parts: list[tuple[_PartName, Text, _Shape, _Mode]]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this program reads {FORMAT}")


_read = Reader(_Manifest, "manifest")


def _check_tensor(part: Part, size: int) -> None:
    """Raise ValueError unless the tensor takes `size` bytes, as far as its dtype is one that numpy knows."""
    fits = True
    if DTYPE.fullmatch(part.dtype):
        with contextlib.suppress(TypeError):  # a library's dtype, or a newer numpy's: its bytes are bytes here
            dtype = np.dtype(part.dtype)
            fits = not dtype.hasobject and dtype.itemsize * math.prod(part.shape) == size
    if not fits:
        raise ValueError(f"{part.name!r}: {size} bytes for a tensor of shape {part.shape} and dtype {part.dtype!r}")


def new_version() -> str:
    """A random one: two trainers never choose the same."""
    return secrets.token_hex(8)


def choose_shard_size(size: int) -> int:
    """A power of 2 that cuts `size` bytes into about AIM shards."""
    aim = max(1, size // AIM)
    return min(LARGEST, max(SMALLEST, 1 << (aim - 1).bit_length()))


def by_name(parts: Sequence[Part], given: Mapping[str, Any]) -> list[Any]:
    """The given things in the order of `parts`. ConfigError names those that are missing or too many."""
    names = [part.name for part in parts]
    if missing := [name for name in names if name not in given]:
        raise ConfigError(f"the object has {missing[:3]} too, {len(missing)} names that were not given")
    if extra := given.keys() - set(names):
        raise ConfigError(f"the object has no {sorted(extra)[:3]} ({len(extra)} names)")
    return [given[name] for name in names]
