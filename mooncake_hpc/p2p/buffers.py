"""What callers bring: arrays, lists of them, state dicts; as bytes, and their digests."""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mooncake_hpc.core.errors import ConfigError, RegistrationError, SizeMismatch
from mooncake_hpc.core.tensors import check_plain, expose, type_name
from mooncake_hpc.p2p.digests import HASHED_AT_ONCE, hashers
from mooncake_hpc.p2p.layout import Bytes, Memory
from mooncake_hpc.p2p.manifest import BUFFERS, TENSORS, Part


def digest_all(memory: Memory, shard_size: int, algorithm: str) -> bytes:
    """The digests of all shards, one after the other, computed on a few cores."""
    new, size = hashers(algorithm), memory.end

    def one(begin: int) -> bytes:
        hasher = new()
        for at in range(begin, min(begin + shard_size, size), HASHED_AT_ONCE):
            for view in memory.views(at, min(at + HASHED_AT_ONCE, begin + shard_size, size)):
                hasher.update(view)
        return hasher.digest()

    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        return b"".join(pool.map(one, range(0, size, shard_size)))


def take_apart(data: object) -> tuple[list[Any], str, tuple[Part, ...]]:
    """Buffers, kind and names of what was given. Raises ConfigError, RegistrationError."""
    if isinstance(data, Mapping):
        parts = tuple(_part(name, value) for name, value in data.items())
        name, count = Counter(part.name for part in parts).most_common(1)[0] if parts else ("", 0)
        if count > 1:
            raise ConfigError(f"two tensors are named {name!r}")
        return [*data.values()], TENSORS, parts
    if isinstance(data, list | tuple):
        return [*data], BUFFERS, ()
    return [data], BUFFERS, ()


def _part(name: object, value: Any) -> Part:
    try:
        exposed = expose(value)
    except RegistrationError as error:
        raise RegistrationError(f"{name!r}: {error}") from None
    return Part(str(name), exposed.dtype, exposed.shape)


def as_bytes(buffer: Any, write: bool = False) -> Bytes:
    """A one-dimensional array of the buffer's bytes, in place. Raises RegistrationError, SizeMismatch."""
    exposed = expose(buffer)
    array = exposed.array
    if not array.nbytes:
        return np.zeros(0, np.uint8)
    check_plain(array, type_name(buffer))
    if write and exposed.readonly:
        raise SizeMismatch("a buffer to receive an object is read-only")
    return array.reshape(-1).view(np.uint8)


def check_receiver(name: str, part: Part, nbytes: int, buffer: Any) -> None:
    """Raise SizeMismatch unless the tensor fits the buffer: of the same dtype and shape, or plain bytes of its size."""
    given = expose(buffer)
    if given.flat_bytes and given.array.nbytes == nbytes:
        return
    dtype = given.dtype if _says_nothing(part.dtype) else part.dtype
    if (given.dtype, given.shape, given.array.nbytes) != (dtype, part.shape, nbytes):
        raise SizeMismatch(
            f"object {name!r}: {part.name!r} is a tensor of dtype {part.dtype!r} and shape {part.shape}, {nbytes} "
            f"bytes; the buffer given for it has dtype {given.dtype!r} and shape {given.shape}, {given.array.nbytes} "
            f"bytes. To receive the bytes as they are, give a flat array of {nbytes} uint8"
        )


def _says_nothing(dtype: str) -> bool:
    """Whether only the size of an element is known: earlier versions wrote that of libraries' dtypes."""
    return dtype[1:2] == "V"


def as_range(given: Any, name: str) -> tuple[int, int]:
    """Begin and end of a byte range. Raises SizeMismatch for what is none."""
    try:
        begin, end = given
        return operator.index(begin), operator.index(end)
    except (TypeError, ValueError) as error:
        raise SizeMismatch(f"object {name!r}: a byte range is two integers, not {given!r}") from error


def some(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:4])) + ("…" if len(sizes) > 4 else "")
