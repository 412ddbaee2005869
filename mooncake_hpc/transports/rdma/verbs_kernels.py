"""The verbs calls of a data path: layouts of <infiniband/verbs.h>, and calls through function addresses.

The layouts are libibverbs' public ABI on 64-bit Linux, the same in rdma-core 44 to 65. `post_send`, `poll_cq` and
`req_notify_cq` are inline functions in C: they call what the device's provider put into the context's table.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mooncake_hpc.native.atomics import I32, I64

# --- struct ibv_send_wr: 128 bytes; struct ibv_sge: 16 bytes
WR, WR_ID, WR_NEXT, WR_SGES, WR_COUNT_OPCODE, WR_FLAGS, WR_REMOTE, WR_KEY = 128, 0, 8, 16, 24, 32, 40, 48
SGE, SGE_ADDRESS, SGE_LENGTH_KEY = 16, 0, 8  # length in the low half, lkey in the high half
RDMA_WRITE, RDMA_READ = 0, 4  # opcodes
SIGNALED = 2  # send flag

# --- struct ibv_wc: 48 bytes
WC, WC_ID, WC_STATUS, WC_VENDOR = 48, 0, 8, 16
SUCCESS, LOCAL_PROTECTION, FLUSHED, REMOTE_ACCESS = 0, 4, 5, 10  # status

# --- what the structs of queue pair, queue and context begin with
QP_CONTEXT, QP_PD, QP_SEND_CQ, QP_NUMBER = 0, 16, 24, 52
CQ_CONTEXT, PD_CONTEXT, CHANNEL_CONTEXT, CHANNEL_FD = 0, 0, 0, 8
MR_LKEY, MR_RKEY = 36, 40
CONTEXT_POLL, CONTEXT_NOTIFY, CONTEXT_POST, CONTEXT_COMMAND_FD, CONTEXT_ASYNC_FD = 96, 104, 208, 264, 268


@intrinsic
def call2(typingctx, function, first, second):
    """The int result of a C function of two words."""

    def gen(ctx, b, sig, args):
        kind = ir.FunctionType(I32, [I64, I64])
        return b.sext(b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:]), I64)

    return types.int64(types.int64, types.int64, types.int64), gen


@intrinsic
def call3(typingctx, function, first, second, third):
    """The int result of a C function of three words (an int argument takes the low half of one)."""

    def gen(ctx, b, sig, args):
        kind = ir.FunctionType(I32, [I64, I64, I64])
        return b.sext(b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:]), I64)

    return types.int64(types.int64, types.int64, types.int64, types.int64), gen
