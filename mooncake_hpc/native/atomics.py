"""What numba lacks: memory at an address, atomics, and libc's calls, all usable in cached nogil kernels.

Addresses are unsigned 64 bits in int64 words: kernels compare them by `below`, and Python hands them over by `word`.
libc is reached by symbol (`types.ExternalFunction`): a function reached through a ctypes object would forbid numba's
cache, and an uncached kernel costs seconds a process.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mooncake_hpc.native.compile import kernel

I64, I32, I8 = ir.IntType(64), ir.IntType(32), ir.IntType(8)
ARCH = platform.machine()
SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(ARCH, 98)
FUTEX_WAIT, FUTEX_WAKE = 0, 1  # without FUTEX_PRIVATE_FLAG: words may be shared by processes


def word(value: int) -> int:
    """Return the int64 of the same bits as an unsigned `value` below 2**64, such as an address."""
    return value - (1 << 64) if value >> 63 else value


def _pointer(builder: Any, address: Any, bits: Any) -> Any:
    return builder.inttoptr(address, bits.as_pointer())  # typed: llvmlite's store_atomic needs .pointee


@intrinsic
def load(typingctx, address):
    """The int64 at `address`, acquire."""

    def gen(ctx, b, sig, args):
        return b.load_atomic(_pointer(b, args[0], I64), "acquire", 8)

    return types.int64(types.int64), gen


@intrinsic
def store(typingctx, address, value):
    """Write the int64 at `address`, release."""

    def gen(ctx, b, sig, args):
        b.store_atomic(args[1], _pointer(b, args[0], I64), "release", 8)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), gen


@intrinsic
def get(typingctx, address):
    """The int64 at `address`, plain."""

    def gen(ctx, b, sig, args):
        return b.load(_pointer(b, args[0], I64))

    return types.int64(types.int64), gen


@intrinsic
def put(typingctx, address, value):
    """Write the int64 at `address`, plain."""

    def gen(ctx, b, sig, args):
        b.store(args[1], _pointer(b, args[0], I64))
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), gen


@intrinsic
def get_byte(typingctx, address):
    """The byte at `address` as int64, 0 to 255."""

    def gen(ctx, b, sig, args):
        return b.zext(b.load(_pointer(b, args[0], I8)), I64)

    return types.int64(types.int64), gen


@intrinsic
def put_byte(typingctx, address, value):
    """Write the low byte of `value` at `address`."""

    def gen(ctx, b, sig, args):
        b.store(b.trunc(args[1], I8), _pointer(b, args[0], I8))
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), gen


@intrinsic
def below(typingctx, one, other):
    """Whether `one` is less than `other`, both unsigned."""

    def gen(ctx, b, sig, args):
        return b.icmp_unsigned("<", args[0], args[1])

    return types.boolean(types.int64, types.int64), gen


@intrinsic
def fetch_add(typingctx, address, value):
    """Add atomically to the int64 at `address`; the value before."""

    def gen(ctx, b, sig, args):
        return b.atomic_rmw("add", _pointer(b, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), gen


@intrinsic
def compare_exchange(typingctx, address, old, new):
    """Replace `old` by `new` atomically; the value found, which equals `old` when it happened."""

    def gen(ctx, b, sig, args):
        pair = b.cmpxchg(_pointer(b, args[0], I64), args[1], args[2], "seq_cst", "acquire")
        return b.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), gen


@intrinsic
def fence(typingctx):
    """Full barrier: no later load passes an earlier store."""

    def gen(ctx, b, sig, args):
        b.fence("seq_cst")
        return ctx.get_dummy_value()

    return types.void(), gen


@intrinsic
def pause(typingctx):
    """The processor's hint for spin loops. An LLVM intrinsic, as numba starts no assembler."""

    def gen(ctx, b, sig, args):
        names = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.isb", [I32(15)])}
        if ARCH in names:
            name, ops = names[ARCH]
            kind = ir.FunctionType(ir.VoidType(), [o.type for o in ops])
            b.call(cgutils.get_or_insert_function(b.module, kind, name), ops)
        return ctx.get_dummy_value()

    return types.void(), gen


@intrinsic
def copy(typingctx, destination, source, length):
    """memmove(destination, source, length)."""

    def gen(ctx, b, sig, args):
        cgutils.raw_memmove(b, _pointer(b, args[0], I8), _pointer(b, args[1], I8), args[2], I64(1))
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), gen


@intrinsic
def address_of(typingctx, array):
    """Address of element 0 of a C-contiguous array."""

    def gen(ctx, b, sig, args):
        return b.ptrtoint(ctx.make_array(sig.args[0])(ctx, b, args[0]).data, I64)

    return types.int64(array), gen


def _libc(name: str, *arguments: Any, result: Any = types.int64) -> Any:
    return types.ExternalFunction(name, result(*arguments))


_i64, _i32 = types.int64, types.int32
syscall = _libc("syscall", *[_i64] * 7)
recv = _libc("recv", _i32, _i64, _i64, _i32)
sendmsg = _libc("sendmsg", _i32, _i64, _i32)
recvmsg = _libc("recvmsg", _i32, _i64, _i32)
accept4 = _libc("accept4", _i32, _i64, _i64, _i32, result=_i32)
getsockname = _libc("getsockname", _i32, _i64, _i64, result=_i32)
setsockopt = _libc("setsockopt", _i32, _i32, _i32, _i64, _i32, result=_i32)
shutdown = _libc("shutdown", _i32, _i32, result=_i32)
close = _libc("close", _i32, result=_i32)
write = _libc("write", _i32, _i64, _i64)
read = _libc("read", _i32, _i64, _i64)
epoll_wait = _libc("epoll_wait", _i32, _i64, _i32, _i32)
release_gil = _libc("PyEval_SaveThread")  # in a `brief` kernel: the thread's state, for `take_gil`
take_gil = _libc("PyEval_RestoreThread", _i64, result=types.void)


def _call(builder: Any, name: str, result: Any, kinds: list[Any], arguments: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, kinds), name)
    return builder.call(function, arguments)


def _on_stack(builder: Any, words: int) -> Any:
    return cgutils.alloca_once(builder, ir.ArrayType(I64, words))


def _word(builder: Any, block: Any, index: int) -> Any:
    return builder.gep(block, [I32(0), I32(index)])


def _timespec(builder: Any, nanoseconds: Any) -> Any:
    spec = _on_stack(builder, 2)
    builder.store(builder.sdiv(nanoseconds, I64(10**9)), _word(builder, spec, 0))
    builder.store(builder.srem(nanoseconds, I64(10**9)), _word(builder, spec, 1))
    return builder.ptrtoint(spec, I64)


@intrinsic
def now(typingctx):
    """CLOCK_MONOTONIC in nanoseconds, the clock of `time.monotonic_ns()`."""

    def gen(ctx, b, sig, args):
        spec = _on_stack(b, 2)
        _call(b, "clock_gettime", I32, [I32, I64], [I32(1), b.ptrtoint(spec, I64)])
        seconds, rest = b.load(_word(b, spec, 0)), b.load(_word(b, spec, 1))
        return b.add(b.mul(seconds, I64(10**9)), rest)

    return types.int64(), gen


@intrinsic
def futex_wait(typingctx, word, expected, nanoseconds):
    """Sleep while the low 32 bits at `word` equal those of `expected`, at most `nanoseconds` (>= 0)."""

    def gen(ctx, b, sig, args):
        spec = _timespec(b, args[2])
        words = [I64(SYS_FUTEX), args[0], I64(FUTEX_WAIT), b.and_(args[1], I64(0xFFFFFFFF)), spec, I64(0), I64(0)]
        return _call(b, "syscall", I64, [I64] * 7, words)

    return types.int64(types.int64, types.int64, types.int64), gen


@intrinsic
def poll(typingctx, first, events, second, nanoseconds):
    """ppoll of `first` for `events` and of `second` (-1: none) for POLLIN; below 0 nanoseconds: no time limit.

    The revents of `first`, with bit 16 set when `second` is readable; 0 after the time.
    """

    def gen(ctx, b, sig, args):
        fds = _on_stack(b, 2)  # two struct pollfd {int fd; short events; short revents}
        low, high = I64(0xFFFFFFFF), I64(32)
        b.store(b.or_(b.and_(args[0], low), b.shl(args[1], high)), _word(b, fds, 0))
        b.store(b.or_(b.and_(args[2], low), b.shl(I64(1), high)), _word(b, fds, 1))
        spec = b.select(b.icmp_signed("<", args[3], I64(0)), I64(0), _timespec(b, args[3]))
        _call(b, "ppoll", I32, [I64] * 4, [b.ptrtoint(fds, I64), I64(2), spec, I64(0)])
        one = b.lshr(b.load(_word(b, fds, 0)), I64(48))
        two = b.lshr(b.load(_word(b, fds, 1)), I64(48))
        ready = b.select(b.icmp_unsigned("!=", two, I64(0)), I64(1 << 16), I64(0))
        return b.or_(one, ready)

    return types.int64(*[types.int64] * 4), gen


@intrinsic
def call_entry(typingctx, function, first, second, third):
    """Call an `Entry` of three arguments at the address `function`."""

    def gen(ctx, b, sig, args):
        kind = ir.FunctionType(I64, [I64, I64, I64])
        return b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(*[types.int64] * 4), gen


@intrinsic
def errno(typingctx):
    """This thread's errno after a failed call."""

    def gen(ctx, b, sig, args):
        kind = ir.FunctionType(I8.as_pointer(), [])
        where = b.call(cgutils.get_or_insert_function(b.module, kind, "__errno_location"), [])
        return b.sext(b.load(b.bitcast(where, I32.as_pointer())), I64)

    return types.int64(), gen


@kernel
def futex_wake(word, waiters):
    """Wake at most `waiters` sleepers on the word at `word`."""
    syscall(SYS_FUTEX, word, FUTEX_WAKE, waiters, 0, 0, 0)
