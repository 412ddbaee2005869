"""Digest algorithms of shards. A manifest names its algorithm, so that a site may choose a cryptographic one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.native import xxh3

DEFAULT = "xxh3-128"
ALGORITHMS = (DEFAULT, "sha256", "blake2b")
HASHED_AT_ONCE = 256 << 10  # bytes: little enough for a cache, enough for a call of Python's
NATIVE_FROM = 2 << 20  # bytes of a shard: below, making a native digest takes longer than the calls that it saves


class Hasher(Protocol):
    """As hashlib's: takes pieces in order; the GIL is released meanwhile."""

    def update(self, data: Any, /) -> None: ...

    def digest(self) -> bytes: ...


def receiving_hashers(algorithm: str) -> Callable[[int], Hasher | xxh3.Digest]:
    """As `hashers`, for so many bytes that are being received: the native one, for `Batch.digest`, where that wins."""
    new = hashers(algorithm)
    if algorithm != DEFAULT:
        return lambda length: new()
    return lambda length: xxh3.Digest(length) if length >= NATIVE_FROM else new()


def hashers(algorithm: str) -> Callable[[], Hasher]:
    """What makes a new hasher of this algorithm. ConfigError names the known ones, or the package that is missing."""
    if algorithm == DEFAULT:
        try:
            from xxhash import xxh3_128
        except ImportError as error:
            raise ConfigError(f"digests by {DEFAULT} need the package xxhash: pip install xxhash") from error
        return xxh3_128
    if algorithm == "sha256":
        return hashlib.sha256
    if algorithm == "blake2b":
        return lambda: hashlib.blake2b(digest_size=32)
    raise ConfigError(f"digest algorithm {algorithm!r} is none of {', '.join(ALGORITHMS)}")


def digest_size(algorithm: str) -> int:
    """Bytes of a digest. Raises as `hashers`."""
    return len(hashers(algorithm)().digest())
