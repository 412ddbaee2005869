"""XXH3 128-bit digests in native code: of bytes that are copied on the way, each read once, or as they are received.

A copy followed by the library's digest reads everything twice and, without streaming stores, three times; where many
processes copy at once, memory bandwidth is what all of them wait for. The library's digest of what a lane receives
takes a step of Python's for each piece that a cache holds; `transports.digest_kernels` takes none. The algorithm is
xxHash's specification of XXH3 for inputs above 240 bytes (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md);
tests compare it with the library's. Eight 64-bit lanes take in a stripe of 64 bytes; a block is 16 stripes, after which
lanes are scrambled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mooncake_hpc.core.memory import data_address
from mooncake_hpc.native.atomics import I8, I32, I64, copy, fence, get, put
from mooncake_hpc.native.compile import brief, kernel

SHORTEST = 241  # bytes: below, the digest is made in other ways
STRIPE, STRIPES = 64, 16
SHORT = 16  # bytes, the shortest that can be stored past the caches
BLOCK = STRIPE * STRIPES
PRIME32_1, PRIME32_2, PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
PRIME64_1, PRIME64_2, PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
PRIME64_4, PRIME64_5, PRIME_MX1 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5, 0x165667919E3779F9
LANES = (PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1)
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
SCRAMBLE, LAST, LOW, HIGH = 128, 121, 11, 117  # offsets into the secret
SIGNED_1, SIGNED_2 = PRIME64_1 - (1 << 64), PRIME64_2 - (1 << 64)  # as factors of int64
DIGEST = 16  # bytes
AHEAD = 2048  # bytes that are fetched into the caches before they are read: processors look ahead within a page only
EXTENT = 24
Extent = tuple[int, int, int]

# --- bytes of a state: the lanes, the stripe before the unfinished block, that block, the words beside it
BEFORE = STRIPE
OPEN = BEFORE + STRIPE
FILLED = OPEN + BLOCK
LEFT = FILLED + 8  # bytes that are still to come
LENGTH = LEFT + 8  # of all
KEY = LENGTH + 8  # address of the secret
STATE_SIZE = KEY + 8

_I128 = ir.IntType(128)
_LANES = ir.VectorType(I64, 8)
_SWAPPED = ir.Constant(ir.VectorType(I32, 8), [1, 0, 3, 2, 5, 4, 7, 6])


def _all(value):
    return ir.Constant(_LANES, [value] * 8)


def _at(builder, address, offset):
    return builder.inttoptr(builder.add(address, I64(offset)), _LANES.as_pointer())


def _take_in(builder, lanes, data, key):
    """The lanes after one more stripe."""
    mixed = builder.xor(data, key)
    product = builder.mul(builder.and_(mixed, _all(0xFFFFFFFF)), builder.lshr(mixed, _all(32)))
    swapped = builder.shuffle_vector(data, ir.Constant(_LANES, ir.Undefined), _SWAPPED)
    return builder.add(builder.add(lanes, swapped), product)


def _prefetch(builder, address, offset):
    pointer = builder.inttoptr(builder.add(address, I64(offset)), I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
    builder.call(function, [pointer, I32(0), I32(3), I32(1)])  # to read, into all caches, data


def _streaming(builder, instruction):
    instruction.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


@intrinsic
def _stripe(typingctx, lanes, source, secret):
    """Take in the stripe at `source` under the key at `secret`."""

    def gen(ctx, b, sig, args):
        where = _at(b, args[0], 0)
        data, key = b.load(_at(b, args[1], 0), align=1), b.load(_at(b, args[2], 0), align=1)
        b.store(_take_in(b, b.load(where, align=8), data, key), where, align=8)
        return ctx.get_dummy_value()

    return types.void(*[types.int64] * 3), gen


def _block(alignment):
    """Takes in the block at `source`. Copies it to `destination` on the way unless `alignment` is 0; past the caches
    where the destination is a multiple of `alignment` bytes, 16 or more."""

    def block(typingctx, lanes, destination, source, secret):
        def gen(ctx, b, sig, args):
            where = _at(b, args[0], 0)
            state = b.load(where, align=8)
            for index in range(STRIPES):
                _prefetch(b, args[2], STRIPE * index + AHEAD)
                data = b.load(_at(b, args[2], STRIPE * index), align=1)
                if alignment:
                    stored = b.store(data, _at(b, args[1], STRIPE * index), align=alignment)
                    if alignment >= SHORT:
                        _streaming(b, stored)
                state = _take_in(b, state, data, b.load(_at(b, args[3], 8 * index), align=1))
            state = b.xor(state, b.lshr(state, _all(47)))
            state = b.xor(state, b.load(_at(b, args[3], SCRAMBLE), align=1))
            b.store(b.mul(state, _all(PRIME32_1)), where, align=8)
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 4), gen

    return intrinsic(block)


_take_block, _copy_block, _stream_short, _stream_block = _block(0), _block(1), _block(SHORT), _block(STRIPE)


@intrinsic
def _begin_lanes(typingctx, lanes):
    """The lanes before anything is taken in."""

    def gen(ctx, b, sig, args):
        b.store(ir.Constant(_LANES, list(LANES)), _at(b, args[0], 0), align=8)
        return ctx.get_dummy_value()

    return types.void(types.int64), gen


@intrinsic
def _merge(typingctx, lanes, key, start):
    """Half of a digest: the lanes folded together under the 64 bytes at `key`, its bytes in the digest's order."""

    def gen(ctx, b, sig, args):
        keyed = b.xor(b.load(_at(b, args[0], 0), align=8), b.load(_at(b, args[1], 0), align=1))
        parts = [b.zext(b.extract_element(keyed, I32(index)), _I128) for index in range(8)]
        total = args[2]
        for one, other in zip(parts[::2], parts[1::2], strict=True):
            product = b.mul(one, other)
            total = b.add(total, b.xor(b.trunc(product, I64), b.trunc(b.lshr(product, _I128(64)), I64)))
        total = b.mul(b.xor(total, b.lshr(total, I64(37))), I64(PRIME_MX1))
        return b.bswap(b.xor(total, b.lshr(total, I64(32))))

    return types.int64(*[types.int64] * 3), gen


@brief
def _begin(state, length):
    """Begin the digest of `length` bytes."""
    _begin_lanes(state)
    put(state + FILLED, 0)
    put(state + LENGTH, length)
    put(state + LEFT, length)


@kernel
def _finish_block(state):
    """Take in the unfinished block, which is whole, and begin the next one."""
    _take_block(state, 0, state + OPEN, get(state + KEY))
    copy(state + BEFORE, state + OPEN + BLOCK - STRIPE, STRIPE)
    put(state + FILLED, 0)


@kernel
def _fill_open(state, destination, source, length):
    """Copy as much as the unfinished block has room for; the bytes."""
    filled = get(state + FILLED)
    size = min(BLOCK - filled, length)
    if destination != source:
        copy(destination, source, size)
    copy(state + OPEN + filled, destination, size)
    put(state + FILLED, filled + size)
    put(state + LEFT, get(state + LEFT) - size)
    return size


@kernel
def _whole_blocks(state, destination, source, length):
    """Copy whole blocks, but none that would be the last of all; the bytes."""
    blocks, secret = min(length, get(state + LEFT) - 1) // BLOCK, get(state + KEY)
    if destination == source:
        for index in range(blocks):
            _take_block(state, 0, source + index * BLOCK, secret)
    elif destination % STRIPE == 0:
        for index in range(blocks):
            _stream_block(state, destination + index * BLOCK, source + index * BLOCK, secret)
    elif destination % SHORT == 0:  # where numpy's large arrays begin
        for index in range(blocks):
            _stream_short(state, destination + index * BLOCK, source + index * BLOCK, secret)
    else:
        for index in range(blocks):
            _copy_block(state, destination + index * BLOCK, source + index * BLOCK, secret)
    fence()  # what streams past the caches is seen by others in no order before this
    size = blocks * BLOCK
    if size:
        copy(state + BEFORE, destination + size - STRIPE, STRIPE)
        put(state + LEFT, get(state + LEFT) - size)
    return size


@kernel
def feed(state, destination, source, length):
    """Copy `length` bytes, unless they are in their place already, and take them in."""
    done = 0
    while done < length:
        if get(state + FILLED) == 0:
            done += _whole_blocks(state, destination + done, source + done, length - done)
        if done < length:
            done += _fill_open(state, destination + done, source + done, length - done)
            if get(state + FILLED) == BLOCK and get(state + LEFT) > 0:
                _finish_block(state)


@brief
def _finish(state, digest):
    """Write the digest of all that was taken in."""
    filled, length, secret = get(state + FILLED), get(state + LENGTH), get(state + KEY)
    for index in range((filled - 1) // STRIPE):
        _stripe(state, state + OPEN + STRIPE * index, secret + 8 * index)
    _stripe(state, state + OPEN + filled - STRIPE, secret + LAST)
    put(digest, _merge(state, secret + HIGH, ~(length * SIGNED_2)))
    put(digest + 8, _merge(state, secret + LOW, length * SIGNED_1))


@kernel
def _copy_all(state, extents, counts, inputs, digests):
    """For each of the inputs: copy its extents {destination, source, bytes}, whose number is in `counts`, one after the
    other, and write the digest of them all."""
    for index in range(inputs):
        count, length = get(counts + 8 * index), 0
        for number in range(count):
            length += get(extents + EXTENT * number + 16)
        _begin(state, length)
        for _ in range(count):
            feed(state, get(extents), get(extents + 8), get(extents + 16))
            extents += EXTENT
        _finish(state, digests + DIGEST * index)


_SECRET: npt.NDArray[np.uint8] = np.frombuffer(SECRET, np.uint8).copy()


def _new_state() -> npt.NDArray[np.int64]:
    state = np.zeros(STATE_SIZE // 8, np.int64)
    state[KEY // 8] = data_address(_SECRET)
    return state


def copy_and_digest(inputs: Sequence[Sequence[Extent]]) -> list[bytes]:
    """Copy the extents (destination address, source address, bytes) of each input, and make of each input the 16 bytes
    of the XXH3 128-bit digest (as xxhash's `digest()`) of all that is then at its destinations, in this order.

    Each input must be at least SHORTEST bytes; ValueError. The GIL is not held.
    """
    for extents in inputs:
        _check(sum(nbytes for *_, nbytes in extents))
    rows = np.array([extent for extents in inputs for extent in extents], np.int64)
    counts = np.array([len(extents) for extents in inputs], np.int64)
    state, digests = _new_state(), np.zeros(DIGEST * len(inputs), np.uint8)
    places = [data_address(array) for array in (state, rows, counts)]
    _copy_all(*places, len(inputs), data_address(digests))
    data = digests.tobytes()
    return [data[at : at + DIGEST] for at in range(0, len(data), DIGEST)]


def _check(length: int) -> None:
    if length < SHORTEST:
        raise ValueError(f"{length} bytes are fewer than {SHORTEST}")


class Digest:
    """The XXH3 128-bit digest of `length` bytes, SHORTEST or more (else ValueError), that come in pieces.

    Used as one of hashlib's, once; and by kernels, which `feed` the state at `address`.
    """

    def __init__(self, length: int) -> None:
        _check(length)
        self._state = _new_state()
        self.address = data_address(self._state)
        _begin(self.address, length)

    def update(self, data: npt.NDArray[np.uint8], /) -> None:
        """Take in a contiguous array of bytes. The GIL is not held."""
        self.feed(data_address(data), data.nbytes)

    def feed(self, address: int, nbytes: int) -> None:
        """As `update`, of memory that the caller keeps."""
        feed(self.address, address, address, nbytes)

    def digest(self) -> bytes:
        """The 16 bytes, once all have been taken in."""
        result = np.zeros(DIGEST, np.uint8)
        _finish(self.address, data_address(result))
        return result.tobytes()
