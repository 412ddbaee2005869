"""Buffer preparation against plain numpy and Python, over odd alignments and lengths."""

import mmap

import numpy as np
import pytest

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.native import prepare

MASK = (1 << 64) - 1
EDGES = [(0, 1), (0, 8), (1, 7), (3, 5), (5, 64), (7, 4099), (8, 4096), (2**40 + 3, 70_001)]


def mix(x: int) -> int:
    x = (x ^ x >> 32) * int(prepare.MULTIPLIER) & MASK
    return x ^ x >> 29


def pattern(seed: int, offset: int, round: int, nbytes: int) -> np.ndarray:
    """The documented pattern, word by word in Python."""
    key, first, last = int(prepare.pattern_key(seed, round)), offset // 8, (offset + nbytes + 7) // 8
    words = [mix((key + i * int(prepare.GOLDEN)) & MASK) for i in range(first, last)]
    return np.array(words, "<u8").view(np.uint8)[offset - 8 * first :][:nbytes]


@pytest.mark.parametrize(("offset", "nbytes"), EDGES)
@pytest.mark.parametrize("shift", [0, 1, 6])
def test_fill_writes_the_documented_pattern_and_nothing_else(offset: int, nbytes: int, shift: int) -> None:
    memory = np.full(nbytes + 32, 0xEE, np.uint8)
    array = memory[shift : shift + nbytes]
    prepare.fill(array, seed=7, offset=offset, round=3)
    np.testing.assert_array_equal(array, pattern(7, offset, 3, nbytes))
    assert (memory[:shift] == 0xEE).all() and (memory[shift + nbytes :] == 0xEE).all()
    assert prepare.verify(array, 7, offset, 3) == 0


@pytest.mark.parametrize(("offset", "nbytes"), EDGES)
def test_verify_counts_each_wrong_byte(offset: int, nbytes: int) -> None:
    rng = np.random.default_rng(nbytes)
    array = np.empty(nbytes, np.uint8)
    prepare.fill(array, 1, offset)
    where = rng.choice(nbytes, size=max(1, nbytes // 3), replace=False)
    array[where] ^= rng.integers(1, 256, where.size, dtype=np.uint8)
    assert prepare.verify(array, 1, offset) == where.size


@pytest.mark.parametrize("other", [(2, 0, 0), (1, 8, 0), (1, 1, 0), (1, 0, 1), (1, 1 << 32, 0)])
def test_another_seed_offset_or_round_is_another_pattern(other: tuple[int, int, int]) -> None:
    array = np.empty(1 << 16, np.uint8)
    prepare.fill(array, 1, 0, 0)
    assert prepare.verify(array, *other) > 0.99 * array.size


def test_stale_bytes_of_any_position_in_a_word_are_seen() -> None:
    """Blocks of one byte, 8 bytes apart, as a strided bench has them: no position may repeat over rounds."""
    array = np.empty(1 << 16, np.uint8)
    for round in range(8):
        prepare.fill(array, 1, 0, round)
        stale = array.copy()
        prepare.fill(array, 1, 0, round + 1)
        for position in range(8):
            assert (stale[position::8] == array[position::8]).mean() < 0.01


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 4096, 100_003])
def test_checksum_is_the_documented_sum(nbytes: int) -> None:
    array = np.random.default_rng(nbytes).integers(0, 256, nbytes + 3, dtype=np.uint8)[3:]
    words = np.frombuffer(array.tobytes() + bytes(-nbytes % 8), "<u8")
    terms = (mix((int(w) + i * int(prepare.GOLDEN)) & MASK) for i, w in enumerate(words))
    assert prepare.checksum(array) == (sum(terms) + mix(nbytes)) & MASK


def test_checksum_sees_order_length_and_single_bits() -> None:
    array = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)
    swapped = np.concatenate([array[8:16], array[:8], array[16:]])
    flipped = array.copy()
    flipped[2048] ^= 1
    variants = [array, array[::-1].copy(), swapped, flipped, array[:-1], np.append(array, np.uint8(0))]
    assert len({prepare.checksum(v) for v in variants}) == len(variants)


def test_functions_work_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stepped = np.empty(100_003, np.uint8), np.empty(100_003, np.uint8)
    prepare.fill(whole, 5, offset=3)
    expected = prepare.checksum(whole)
    monkeypatch.setattr(prepare, "STEP", 4096)
    prepare.fill(stepped, 5, offset=3)
    np.testing.assert_array_equal(whole, stepped)
    assert prepare.checksum(stepped) == expected and prepare.verify(stepped, 5, 3) == 0


BLOCKS = [(1, 1, 9), (3, 8, 1000), (4096, 5000, 7), (0, 4, 5), (9, 9, 0)]


@pytest.mark.parametrize(("block", "stride", "count"), BLOCKS)
def test_gather_and_scatter_are_numpy_strides(block: int, stride: int, count: int) -> None:
    size = stride * count + 8
    source = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
    index = (np.arange(count)[:, None] * stride + np.arange(block)).ravel()
    packed = np.full(block * count + 4, 0xEE, np.uint8)
    prepare.gather(source, packed, block, stride, count)
    np.testing.assert_array_equal(packed[: block * count], source[index])
    assert (packed[block * count :] == 0xEE).all()
    spread, expected = np.full(size, 0xEE, np.uint8), np.full(size, 0xEE, np.uint8)
    expected[index] = source[index]
    prepare.scatter(packed, spread, block, stride, count)
    np.testing.assert_array_equal(spread, expected)


def test_gather_refuses_what_does_not_fit() -> None:
    a, b = np.zeros(100, np.uint8), np.zeros(40, np.uint8)
    for block, stride, count in [(10, 31, 4), (10, 5, 2), (-1, 5, 2), (10, 10, 5), (1, 1, -1)]:
        with pytest.raises(ConfigError, match="block"):
            prepare.gather(a, b, block, stride, count)


@pytest.mark.parametrize("write", [True, False])
def test_touch_faults_all_pages_and_changes_no_byte(write: bool) -> None:
    region = mmap.mmap(-1, 64 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(region, np.uint8)
    array[5] = 9
    before = resident(array)
    prepare.touch(array, write)
    assert array[5] == 9 and array.sum() == 9
    if write:  # a private page that was only read is the shared zero page, which counts for nothing
        assert resident(array) - before >= 63 * mmap.PAGESIZE // 1024
    rng = np.random.default_rng(2).integers(0, 256, 10_007, dtype=np.uint8)[3:]
    copy = rng.copy()
    prepare.touch(rng, write)
    np.testing.assert_array_equal(rng, copy)


def resident(array: np.ndarray) -> int:
    """KiB of physical memory behind the mapping that `array` lies in."""
    address, here = array.ctypes.data, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                start, end = (int(x, 16) for x in first.split("-"))
                here = start <= address < end
            elif here and first == "Rss:":
                return int(line.split()[1])
    raise AssertionError("address is not mapped")


def test_poison() -> None:
    memory = np.zeros(1000, np.uint8)
    prepare.poison(memory[1:-1], 0x5A)
    assert (memory[1:-1] == 0x5A).all() and memory[0] == memory[-1] == 0


def test_read_only_and_strided_arrays_are_refused() -> None:
    frozen = np.zeros(8, np.uint8)
    frozen.flags.writeable = False
    with pytest.raises(ConfigError, match="read-only"):
        prepare.fill(frozen, 1)
    with pytest.raises(ConfigError, match="contiguous"):
        prepare.verify(np.zeros(8, np.uint8)[::2], 1)
    assert prepare.verify(frozen, 1) > 0
    prepare.touch(frozen, write=False)
