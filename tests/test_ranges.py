"""Range tables for kernels: addresses are unsigned 64 bits, and nothing that overflows is inside anything."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mooncake_hpc.native import ranges
from mooncake_hpc.native.atomics import word

TOP = 1 << 64
SIGN = 1 << 63
EDGES = [
    edge + offset for edge in (0, SIGN, TOP) for offset in (-8192, -4096, -1, 0, 1, 4096) if 0 <= edge + offset < TOP
]


def _room(pairs: list[tuple[int, int]], address: int) -> int:
    return max((end - address for start, end in pairs if start <= address < end), default=0)


def _covered(pairs: list[tuple[int, int]], address: int, length: int) -> bool:
    while length > 0 and (size := _room(pairs, address)):
        address, length = address + size, length - size
    return length <= 0 and address <= TOP


def test_every_edge_of_the_address_space_is_where_arithmetic_without_limits_says() -> None:
    random_ = random.Random(1)
    for _ in range(200):
        pairs = []
        for _ in range(random_.randrange(5)):
            start = random_.choice(EDGES)
            length = random_.choice([1, 2, 4095, 4096, 8192, SIGN - 1])
            pairs.append((start, min(start + length, TOP)))
        table = ranges.table(pairs)
        at = int(table.ctypes.data)
        for address in EDGES:
            assert ranges.room(at, word(address)) == _room(pairs, address), (pairs, hex(address))
            for length in (1, 2, 4096, 8192, SIGN - 1):
                wanted = _covered(pairs, address, length)
                assert ranges.covered(at, word(address), length) == wanted, (pairs, hex(address), length)


def test_a_keyed_table_finds_the_row_of_the_range_that_goes_on_furthest() -> None:
    table = ranges.keyed([(SIGN - 10, SIGN + 10, (7, 8)), (SIGN, SIGN + 5, (1, 2)), (TOP - 4, TOP, (3, 4))])
    at = int(table.ctypes.data)
    for address, wanted in ((SIGN - 1, 7), (SIGN + 4, 7), (TOP - 4, 3), (TOP - 1, 3), (SIGN + 10, None), (0, None)):
        row = ranges.row(at, word(address))
        assert (int(table[(row - at) // 8]) if row else None) == wanted


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4), (0, TOP + 1), (TOP, TOP + 1), (0, SIGN)])
def test_what_is_no_range_makes_no_table(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="no range of addresses"):
        ranges.table([(start, end)])


def test_an_empty_range_holds_nothing() -> None:
    assert len(ranges.table([(5, 5)])) == 1 == int(np.sum(ranges.table([]) == 0))
