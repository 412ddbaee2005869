"""What pyverbs does not do: memory at an address, and registration by libibverbs itself, without the GIL."""

from __future__ import annotations

import ctypes
import errno
import functools
import os

from mooncake_hpc.core.errors import DeviceError
from mooncake_hpc.transports.rdma import verbs_kernels as layout


def peek(address: int, size: int) -> int:
    """An unsigned number in this process's memory. Raises OSError where nothing is mapped, instead of a crash."""
    memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)  # anew: in a forked child an old one is the parent's
    try:
        data = os.pread(memory, size, address)
    finally:
        os.close(memory)
    if len(data) != size:
        raise OSError(errno.EIO, f"no memory at {address:#x}")
    return int.from_bytes(data, "little")


class Region:
    """A memory region by libibverbs itself: pyverbs would hold the GIL while pages are pinned, which takes seconds."""

    def __init__(self, pd: int, address: int, length: int, access: int) -> None:
        """Raises OSError."""
        self._library = _libibverbs()
        self._mr = self._library.ibv_reg_mr_iova2(pd, address, length, address, access)
        if not self._mr:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.lkey = peek(self._mr + layout.MR_LKEY, 4)
        self.rkey = peek(self._mr + layout.MR_RKEY, 4)

    def close(self) -> None:
        """Raises DeviceError."""
        code = self._library.ibv_dereg_mr(self._mr)
        if code:
            raise DeviceError(f"a memory region cannot be released: {os.strerror(code)}", code)


@functools.cache
def _libibverbs() -> ctypes.CDLL:
    library = ctypes.CDLL("libibverbs.so.1", use_errno=True)
    library.ibv_reg_mr_iova2.restype = ctypes.c_void_p
    library.ibv_reg_mr_iova2.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_uint64,
        ctypes.c_uint,
    ]
    library.ibv_dereg_mr.argtypes = [ctypes.c_void_p]
    return library
