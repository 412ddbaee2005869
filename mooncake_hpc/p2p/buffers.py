"""What callers bring: arrays, lists of them, state dicts; as bytes, and their digests."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_hpc.errors import RegistrationError, SizeMismatch
from mooncake_hpc.memory import describe
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
    """Buffers, kind and names of what was given."""
    if isinstance(data, Mapping):
        arrays = {str(name): _named(name, value) for name, value in data.items()}
        parts = tuple(Part(name, array.dtype.str, array.shape) for name, array in arrays.items())
        return [*data.values()], TENSORS, parts
    if isinstance(data, list | tuple):
        return [*data], BUFFERS, ()
    return [data], BUFFERS, ()


def _named(name: object, value: Any) -> npt.NDArray[Any]:
    try:
        return as_array(value)
    except RegistrationError as error:
        raise RegistrationError(f"{name!r}: {error}") from None


def as_array(value: Any) -> npt.NDArray[Any]:
    """An array over a tensor's memory; what numpy has no dtype for (bfloat16) as bytes."""
    if isinstance(value, np.ndarray):
        return value
    view = describe(value)
    if isinstance(view.owner, tuple):  # (object, array)
        array: npt.NDArray[Any] = view.owner[1]
        return array
    return np.asarray(value)


def as_bytes(buffer: Any, write: bool = False) -> Bytes:
    """A one-dimensional array of the buffer's bytes. Raises RegistrationError, SizeMismatch."""
    array = as_array(buffer) if getattr(buffer, "nbytes", 1) else np.zeros(0, np.uint8)
    if array.nbytes:
        describe(array)  # refuses what is not contiguous
    if write and not array.flags.writeable:
        raise SizeMismatch("a buffer to receive an object is read-only")
    return array.reshape(-1).view(np.uint8) if array.nbytes else np.zeros(0, np.uint8)


def as_range(given: Any, name: str) -> tuple[int, int]:
    """Begin and end of a byte range. Raises SizeMismatch for what is none."""
    try:
        begin, end = given
        return operator.index(begin), operator.index(end)
    except (TypeError, ValueError) as error:
        raise SizeMismatch(f"object {name!r}: a byte range is two integers, not {given!r}") from error


def some(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:4])) + ("…" if len(sizes) > 4 else "")
