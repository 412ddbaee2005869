"""Buffer preparation at memory speed: fill with a pattern, verify, checksum, gather, scatter, touch, poison.

Each operation has two faces: a `*_range` kernel over an address, which runs without the GIL and is what
worker processes call, and a Python function over an array. The functions work in steps of `STEP` bytes, so
that Ctrl-C is noticed between two of them.

**Pattern.** Byte `o` of the pattern is byte `o % 8`, little-endian, of the 64-bit word

    word(i) = mix(key + i * GOLDEN)   with i = o // 8 and key = pattern_key(seed, round), modulo 2**64
    mix(x):   x = (x ^ x >> 32) * MULTIPLIER;   x ^ x >> 29

`mix` is a bijection: at one offset, words of two rounds always differ, and a round has no word twice.

**Checksum.** The sum of `mix(w[i] + i * GOLDEN)` over the array's little-endian words `w`, the last one
padded with zeros, plus `mix(length in bytes)`, modulo 2**64. Sums of pieces add up. It finds corrupted,
swapped, shifted and missing words; it is no protection against intent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.native import atomics as native
from mooncake_hpc.native.atomics import I8, I64
from mooncake_hpc.native.compile import kernel

Bytes = npt.NDArray[np.uint8]

STEP = 64 << 20
PAGE = 4096  # the smallest page of x86_64 and aarch64: larger ones are touched more than once
CHUNK = 512  # words that verify compares before it looks at the result
MASK = (1 << 64) - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd, 2**64 / golden ratio
MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)  # odd, from Pelle Evensen's rrmxmx
LOW_BITS = np.uint64(0x0101010101010101)
S1, S2, S4, S29, S32, S56 = (np.uint64(n) for n in (1, 2, 4, 29, 32, 56))


@intrinsic
def word(typingctx, base, index):
    """The 64-bit word `index` after address `base`, of any alignment."""

    def gen(ctx, b, sig, args):
        return b.load(b.gep(b.inttoptr(args[0], I64.as_pointer()), [args[1]]), align=1)

    return types.uint64(types.int64, types.int64), gen


@intrinsic
def set_word(typingctx, base, index, value):
    """Write the 64-bit word `index` after address `base`, of any alignment."""

    def gen(ctx, b, sig, args):
        b.store(args[2], b.gep(b.inttoptr(args[0], I64.as_pointer()), [args[1]]), align=1)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64), gen


@intrinsic
def put_byte(typingctx, address, value):
    """Write the low byte of `value` at `address`."""

    def gen(ctx, b, sig, args):
        b.store(b.trunc(args[1], I8), b.inttoptr(args[0], I8.as_pointer()))
        return ctx.get_dummy_value()

    return types.void(types.int64, types.uint64), gen


@intrinsic
def set_bytes(typingctx, address, value, length):
    """memset(address, value, length)."""

    def gen(ctx, b, sig, args):
        cgutils.memset(b, b.inttoptr(args[0], I8.as_pointer()), args[2], b.trunc(args[1], I8))
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), gen


@kernel
def mix(x):
    """Scramble an uint64; a bijection."""
    x = (x ^ (x >> S32)) * MULTIPLIER
    return x ^ (x >> S29)


@kernel
def pattern_byte(key, offset):
    """Byte `offset` of the pattern, as uint64."""
    return mix(key + np.uint64(offset >> 3) * GOLDEN) >> np.uint64((offset & 7) << 3) & np.uint64(255)


@kernel
def fill_range(address, nbytes, key, offset):
    """Write the pattern from `offset` on over `nbytes` bytes; any alignment of each."""
    head = min(-offset & 7, nbytes)
    words = (nbytes - head) >> 3
    base = address + head
    first = key + np.uint64((offset + head) >> 3) * GOLDEN
    for i in range(head):
        put_byte(address + i, pattern_byte(key, offset + i))
    for i in range(words):
        set_word(base, i, mix(first + np.uint64(i) * GOLDEN))
    for i in range(head + 8 * words, nbytes):
        put_byte(address + i, pattern_byte(key, offset + i))


@kernel
def wrong_bytes(difference):
    """How many of the eight bytes are not 0."""
    d = difference
    d |= d >> S4
    d |= d >> S2
    d |= d >> S1
    return np.int64((d & LOW_BITS) * LOW_BITS >> S56)


@kernel
def verify_range(address, nbytes, key, offset):
    """How many of `nbytes` bytes differ from the pattern at `offset`."""
    head = min(-offset & 7, nbytes)
    words = (nbytes - head) >> 3
    base = address + head
    first = key + np.uint64((offset + head) >> 3) * GOLDEN
    wrong = 0
    for i in range(head):
        wrong += np.uint64(native.get_byte(address + i)) != pattern_byte(key, offset + i)
    for start in range(0, words, CHUNK):
        stop = min(start + CHUNK, words)
        any_difference = np.uint64(0)
        for i in range(start, stop):
            any_difference |= word(base, i) ^ mix(first + np.uint64(i) * GOLDEN)
        if any_difference != 0:
            for i in range(start, stop):
                wrong += wrong_bytes(word(base, i) ^ mix(first + np.uint64(i) * GOLDEN))
    for i in range(head + 8 * words, nbytes):
        wrong += np.uint64(native.get_byte(address + i)) != pattern_byte(key, offset + i)
    return wrong


@kernel
def checksum_range(address, nbytes, offset):
    """The sum over `nbytes` bytes, which begin at byte `offset`, a multiple of 8, of the array."""
    words = nbytes >> 3
    first = np.uint64(offset >> 3) * GOLDEN
    total = np.uint64(0)
    for i in range(words):
        total += mix(word(address, i) + first + np.uint64(i) * GOLDEN)
    if nbytes & 7:
        last = np.uint64(0)
        for i in range(nbytes & 7):
            last |= np.uint64(native.get_byte(address + 8 * words + i)) << np.uint64(8 * i)
        total += mix(last + first + np.uint64(words) * GOLDEN)
    return total


@kernel
def strided_copy(source, source_stride, destination, destination_stride, block, count):
    """Copy `count` blocks of `block` bytes; the strides are bytes between the starts of two blocks."""
    for i in range(count):
        native.copy(destination + i * destination_stride, source + i * source_stride, block)


@kernel
def touch_range(address, nbytes, write):
    """Fault in each page; with `write` for writing, which changes no byte even while others write them."""
    last = address + nbytes - 1
    total = 0
    for page in range(address & -PAGE, last + 1, PAGE):
        here = max(page, address & -8)
        value = native.load(here)
        total += value
        if write:
            native.compare_exchange(here, value, value)
    return total


@kernel
def poison_range(address, nbytes, value):
    """Write the byte `value` over `nbytes` bytes."""
    set_bytes(address, value, nbytes)


def pattern_key(seed: int, round: int) -> np.uint64:
    """The pattern's key: SplitMix64's finaliser over `seed`, then over the result and `round`."""
    key = 0
    for part in (seed, round):
        x = ((key ^ part) + int(GOLDEN)) & MASK
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
        key = x ^ x >> 31
    return np.uint64(key)


def fill(array: Bytes, seed: int, offset: int = 0, round: int = 0) -> None:
    """Write the pattern of `seed` and `round` over `array`, whose first byte is byte `offset` of the pattern.

    Raises ConfigError when `array` is not C-contiguous or is read-only.
    """
    key = pattern_key(seed, round)
    for address, nbytes, at in _steps(array, write=True):
        fill_range(address, nbytes, key, offset + at)


def verify(array: Bytes, seed: int, offset: int = 0, round: int = 0) -> int:
    """How many bytes of `array` are not what `fill` with the same arguments writes."""
    key = pattern_key(seed, round)
    return sum(verify_range(address, nbytes, key, offset + at) for address, nbytes, at in _steps(array))


def checksum(array: Bytes) -> int:
    """The 64-bit checksum of `array` (see the module's text); order and length count."""
    return finish_checksum((checksum_range(*step) for step in _steps(array)), array.nbytes)


def finish_checksum(sums: Iterable[int], nbytes: int) -> int:
    """The checksum of an array of `nbytes` bytes from the sums of its pieces."""
    return (sum(int(s) for s in sums) + int(mix(np.uint64(nbytes)))) & MASK


def gather(source: Bytes, destination: Bytes, block: int, stride: int, count: int) -> None:
    """Pack `count` blocks of `block` bytes, every `stride` bytes in `source`, closely into `destination`.

    Raises ConfigError when they do not fit either array. The arrays must not overlap.
    """
    check_blocks(source, destination, block, stride, count)
    a, b = address_of(source), address_of(destination, write=True)
    for start, n in _groups(block, count):
        strided_copy(a + start * stride, stride, b + start * block, block, block, n)


def scatter(source: Bytes, destination: Bytes, block: int, stride: int, count: int) -> None:
    """The inverse of `gather`: spread the blocks of `source` over `destination`, `stride` bytes apart.

    Bytes between the blocks stay as they are. Raises ConfigError as `gather`, and when `stride` < `block`.
    """
    check_blocks(destination, source, block, stride, count)
    a, b = address_of(source), address_of(destination, write=True)
    for start, n in _groups(block, count):
        strided_copy(a + start * block, block, b + start * stride, stride, block, n)


def touch(array: Bytes, write: bool = True) -> None:
    """Fault in the pages of `array`, for writing or only for reading; the bytes stay as they are."""
    for address, nbytes, _ in _steps(array, write=write):
        touch_range(address, nbytes, write)


def poison(array: Bytes, value: int = 0xA5) -> None:
    """Write the byte `value` over `array`."""
    for address, nbytes, _ in _steps(array, write=True):
        poison_range(address, nbytes, value)


def address_of(array: Bytes, write: bool = False) -> int:
    """Address of the first byte. Raises ConfigError if not C-contiguous, or read-only and to `write`."""
    if not array.flags.c_contiguous:
        raise ConfigError(f"array of shape {array.shape} and strides {array.strides} must be C-contiguous")
    if write and not array.flags.writeable:
        raise ConfigError(f"array of {array.nbytes} bytes is read-only")
    return int(array.ctypes.data)


def check_blocks(strided: Bytes, packed: Bytes, block: int, stride: int, count: int) -> None:
    """Raise ConfigError unless `count` blocks fit both arrays and do not overlap each other."""
    if block < 0 or count < 0 or stride < block:
        raise ConfigError(f"{block=}, {stride=}, {count=}: need 0 <= block <= stride, 0 <= count")
    need = (count - 1) * stride + block if count else 0
    if strided.nbytes < need or packed.nbytes < count * block:
        raise ConfigError(
            f"{count} blocks of {block} bytes every {stride} need {need} strided and {count * block} "
            f"packed bytes, but the arrays have {strided.nbytes} and {packed.nbytes}"
        )


def _steps(array: Bytes, write: bool = False) -> Iterator[tuple[int, int, int]]:
    """(address, bytes, offset in the array) of each STEP."""
    address, nbytes = address_of(array, write), array.nbytes
    return ((address + at, min(STEP, nbytes - at), at) for at in range(0, nbytes, STEP))


def _groups(block: int, count: int) -> Iterator[tuple[int, int]]:
    """(first block, blocks) of each STEP."""
    size = max(1, STEP // max(block, 1))
    return ((start, min(size, count - start)) for start in range(0, count, size))
