"""How kernels are compiled, cached, and reached: as functions of Python's, and as C functions by their address."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import time
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

from numba import njit, types
from numba.core.ccallback import CFunc

log = logging.getLogger(__name__)

SOURCES = sorted(
    (file.name, int(file.stat().st_mtime), file.stat().st_size) for file in os.scandir(os.path.dirname(__file__))
    if file.name.endswith(".py")
)  # fmt: skip


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled, cached, without the GIL."""
    return _compile(function, nogil=True)


def brief(function: Callable[..., Any]) -> Any:
    """As `kernel`, but with the GIL held: for short ones that no other Python thread may interleave with."""
    return _compile(function, nogil=False)


def _compile(function: Callable[..., Any], nogil: bool) -> Any:
    try:
        dispatcher: Any = njit(nogil=nogil, cache=True)(function)
    except RuntimeError as error:  # "cannot cache function ...: no locator available"
        warnings.warn(f"numba kernels are compiled anew in this process: {error}", stacklevel=3)
        dispatcher = njit(nogil=nogil)(function)
    _stamp(dispatcher)
    specialize = dispatcher.compile

    def compile_plain(kinds: Any) -> Any:
        """Constants as arguments share one version: numba would make one for each of their values."""
        return specialize(tuple(types.unliteral(kind) for kind in kinds) if isinstance(kinds, tuple) else kinds)

    dispatcher.compile = compile_plain
    return dispatcher


def _stamp(dispatcher: Any) -> None:
    """Have a cached kernel count as old when any kernel's file has changed: numba looks at its own file alone, while
    what it calls is compiled into it. (Attributes as of numba 0.60 to 0.68; without them numba's own rule holds.)"""
    index: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(index, "_source_stamp"):
        index._source_stamp = (index._source_stamp, *SOURCES)


class Entry:
    """A C function for a kernel of int64 arguments and result, so that kernels reach it through its address. Cached."""

    def __init__(self, function: Callable[..., Any]) -> None:
        words = (types.int64,) * len(inspect.signature(function).parameters)
        self._callback: Any = CFunc(function, (words, types.int64), {}, {})
        with contextlib.suppress(RuntimeError):  # as in `_compile`, which warns
            self._callback.enable_caching()
        _stamp(self._callback)
        self._new: bool | None = None

    @cached_property
    def address(self) -> int:
        """Where it is; compiled, or loaded from the cache, when first asked for."""
        self.compile()
        address: int = self._callback.address
        return address

    def compile(self) -> bool:
        """Whether it was not in the cache."""
        if self._new is None:
            self._callback.compile()
            self._new = not self._callback.cache_hits
        return self._new


def compile_ahead(first: Any, *others: Any) -> None:
    """Have kernels of int64 arguments compiled before any deadline runs: on a busy machine that takes a minute.

    What is in the cache already is left to be loaded when it is first called; `first` stands for all.
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
