"""How kernels are compiled, cached, and reached: as functions of Python's, and as C functions by their address."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from typing import Any

from llvmlite.binding import ffi
from numba import njit, types
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock

from mooncake_hpc.core import process
from mooncake_hpc.native.cache import KernelCache

log = logging.getLogger(__name__)

# A kernel is compiled, or loaded, by whichever thread calls it first. A child of a fork in the middle of that could
# compile nothing, for ever. (Attributes as of numba 0.60 to 0.68.)
for guard in (global_compiler_lock, getattr(ffi.lib, "_lock", None)):
    if (inner := getattr(guard, "_lock", None)) is not None:
        process.finish_before_forks(inner)


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled, cached, without the GIL."""
    return _compile(function, nogil=True)


def brief(function: Callable[..., Any]) -> Any:
    """As `kernel`, but with the GIL held: for short ones that no other Python thread may interleave with."""
    return _compile(function, nogil=False)


def _compile(function: Callable[..., Any], nogil: bool) -> Any:
    dispatcher: Any = njit(nogil=nogil)(function)
    # as `enable_caching` sets its own (numba 0.60 to 0.68)
    dispatcher._cache = KernelCache(function)
    specialize = dispatcher.compile

    def compile_plain(kinds: Any) -> Any:
        """Constants as arguments share one version: numba would make one for each of their values."""
        return specialize(tuple(types.unliteral(kind) for kind in kinds) if isinstance(kinds, tuple) else kinds)

    dispatcher.compile = compile_plain
    return dispatcher


def kept(callback: Any) -> Any:
    """Have a C function of numba's kept as kernels are; returns it."""
    callback._cache = KernelCache(callback.__wrapped__, "-entry")
    return callback


class Entry:
    """A C function for a kernel of int64 arguments and result, so that kernels reach it through its address. Cached."""

    def __init__(self, function: Callable[..., Any]) -> None:
        words = (types.int64,) * len(inspect.signature(function).parameters)
        self._callback: Any = kept(CFunc(function, (words, types.int64), {}, {}))
        self._new: bool | None = None
        self._address = 0

    @property
    def address(self) -> int:
        """Where it is; compiled, or loaded from the cache, when first asked for."""
        if not self._address:  # no cached_property: until Python 3.12 that has a lock, which a fork may find held
            self.compile()
            self._address = self._callback.address
        return self._address

    def compile(self) -> bool:
        """Whether it was not in the cache."""
        if self._new is None:
            self._callback.compile()
            self._new = not self._callback.cache_hits
        return self._new


def compile_ahead(first: Any, *others: Any) -> None:
    """Have kernels of int64 arguments compiled before any deadline runs: on a busy machine that takes a minute.

    What is in the cache already is left to be loaded when it is first called; `first`, which no other list may hold,
    stands for all.
    """
    begin = time.monotonic()
    if not _compile_one(first):
        return
    for each in others:
        _compile_one(each)
    log.info("kernels were compiled in %.1f s, once for all processes of this version", time.monotonic() - begin)


def preload(*kernels: Any) -> None:
    """Have kernels of int64 arguments in this process now: a first call opens files, and descriptors may run out."""
    for each in kernels:
        _compile_one(each)


def _compile_one(each: Any) -> bool:
    """Whether it was not in the cache."""
    if isinstance(each, Entry):
        return each.compile()
    known = sum(each.stats.cache_misses.values())
    each.compile((types.int64,) * len(inspect.signature(each.py_func).parameters))
    return bool(sum(each.stats.cache_misses.values()) > known)
