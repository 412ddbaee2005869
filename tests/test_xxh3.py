"""The pass that copies and digests, beside the library's digest."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from xxhash import xxh3_128

from mooncake_hpc.native import xxh3

EDGES = (241, 255, 256, 1023, 1024, 1025, 1088, 2047, 2048, 2049, 5000, (1 << 20) + 13)
PARTS = (0, 1, 7, 63, 64, 65, 200, 960, 1023, 1024, 1025, 2048, 10_000)


def check(lengths: list[int], source_offset: int, destination_offset: int) -> None:
    """Copy so many bytes from one array to another; all of the digest, the bytes, and the bytes around them."""
    total, rng = sum(lengths), np.random.default_rng(len(lengths))
    source = rng.integers(0, 256, total + 64, np.uint8)
    target = np.zeros(total + 256, np.uint8)
    first = -target.ctypes.data % 64 + destination_offset
    starts = [0, *accumulate(lengths)][:-1]
    extents = [
        (target.ctypes.data + first + at, source.ctypes.data + source_offset + at, length)
        for at, length in zip(starts, lengths, strict=True)
    ]
    expected = source[source_offset : source_offset + total]
    assert xxh3.copy_and_digest([extents]) == [xxh3_128(expected).digest()], lengths
    assert np.array_equal(target[first : first + total], expected)
    assert not target[:first].any() and not target[first + total :].any()


@pytest.mark.parametrize("length", EDGES)
@pytest.mark.parametrize(("source_offset", "destination_offset"), [(0, 0), (3, 0), (0, 5)])
def test_one_extent(length: int, source_offset: int, destination_offset: int) -> None:
    check([length], source_offset, destination_offset)


def test_extents_of_any_lengths() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        lengths = [*map(int, rng.choice(PARTS, rng.integers(1, 7)))]
        if sum(lengths) >= xxh3.SHORTEST:
            check(lengths, int(rng.integers(0, 64)), int(rng.choice([0, 0, 8, 33])))


def test_several_inputs() -> None:
    source = np.random.default_rng(1).integers(0, 256, 100_000, np.uint8)
    target = np.zeros_like(source)
    pieces = [[(0, 241)], [(241, 5000), (5241, 0), (5241, 70_000)], [(75_241, 1024)], [(76_265, 23_735)]]
    inputs = [[(target.ctypes.data + at, source.ctypes.data + at, n) for at, n in piece] for piece in pieces]
    expected = [xxh3_128(source[piece[0][0] : sum(piece[-1])]).digest() for piece in pieces]
    assert xxh3.copy_and_digest(inputs) == expected
    assert np.array_equal(source, target)


def test_too_short() -> None:
    with pytest.raises(ValueError, match="fewer"):
        xxh3.copy_and_digest([[(0, 0, xxh3.SHORTEST)], [(0, 0, xxh3.SHORTEST - 1)]])


def test_digest_of_pieces() -> None:
    rng = np.random.default_rng(5)
    for length in (*EDGES, 30_000):
        data = rng.integers(0, 256, length + 3, np.uint8)[3:]
        for largest in (1, 64, 1024, 5000, length) if length < 10_000 else (5000, length):
            digest, at = xxh3.Digest(length), 0
            while at < length:
                size = int(rng.integers(0, min(largest, length - at), endpoint=True))
                digest.update(data[at : at + size])
                at += size
            assert digest.digest() == xxh3_128(data).digest(), (length, largest)
    with pytest.raises(ValueError, match="fewer"):
        xxh3.Digest(xxh3.SHORTEST - 1)
