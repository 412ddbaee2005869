"""In which order libstdc++ iterates a std::unordered_map keyed by strings.

The original numbers a segment's devices while it iterates such a map, so a publisher must know the order.
Checked against programs compiled with g++ 12; the container and its hash are part of libstdc++'s stable ABI.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

MASK = (1 << 64) - 1
MULTIPLIER = 0xC6A4A7935BD1E995
SEED = 0xC70F6907
BUCKETS = (1, 13, 29, 59, 127, 257, 541, 1109, 2357, 5087)  # the sizes to which it grows, one insertion at a time
HEAD = None  # the place before the first element


def hash_bytes(data: bytes, seed: int = SEED) -> int:
    """std::hash of a string on a 64-bit little-endian machine: _Hash_bytes, a MurmurHash64A."""

    def mix(value: int) -> int:
        return value ^ (value >> 47)

    result = seed ^ (len(data) * MULTIPLIER & MASK)
    whole = len(data) & ~7
    for at in range(0, whole, 8):
        word = mix(int.from_bytes(data[at : at + 8], "little") * MULTIPLIER & MASK) * MULTIPLIER & MASK
        result = (result ^ word) * MULTIPLIER & MASK
    if whole < len(data):
        result = (result ^ int.from_bytes(data[whole:], "little")) * MULTIPLIER & MASK
    return mix(mix(result) * MULTIPLIER & MASK)


def iteration_order(keys: Iterable[str]) -> list[str]:
    """The keys as a map iterates them into which they were put one by one, in the given order."""
    chain: list[str] = []
    sizes = pairwise(BUCKETS)
    buckets, larger = next(sizes)
    for key in keys:
        if len(chain) + 1 > buckets or buckets == 1:
            buckets = larger
            _, larger = next(sizes)
            chain = _link(chain, buckets)
        _insert(chain, key, buckets)
    return chain


def _link(keys: Iterable[str], buckets: int) -> list[str]:
    """The chain of all elements, which is what the map iterates, after linking them in one by one."""
    chain: list[str] = []
    for key in keys:
        _insert(chain, key, buckets)
    return chain


def _insert(chain: list[str], key: str, buckets: int) -> None:
    """A bucket's elements stand together in the chain: a new one goes before them, or first of all."""
    bucket = hash_bytes(key.encode()) % buckets
    same = (at for at, other in enumerate(chain) if hash_bytes(other.encode()) % buckets == bucket)
    chain.insert(next(same, 0), key)
