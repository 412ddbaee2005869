"""Compiled kernels between processes: numba's interface of a cache, over files of our own.

numba's own cache ends a process at a torn file, refuses a folder that it cannot write to, and keeps an index that hosts
on a shared folder write over one another. Here each compiled version has one file and no index. Nothing that is wrong
with a file or a disk reaches the caller: the kernel is compiled, and the log says once why.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from mooncake_hpc.native import cache_files as files
from mooncake_hpc.native.cache_folder import kernel_folder

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent.parent


def kernel_sources() -> list[Path]:
    """The files that hold kernels: all of `native`, and whatever else is called `*kernels.py`."""
    return sorted([*PACKAGE.glob("native/*.py"), *PACKAGE.rglob("*kernels.py")])


# What is called is compiled into its caller: a kernel counts as old when the file of any kernel has changed.
SOURCES = [
    (path.relative_to(PACKAGE).as_posix(), int(path.stat().st_mtime), path.stat().st_size) for path in kernel_sources()
]
ENVIRONMENT = (sys.implementation.cache_tag, numba.__version__, llvmlite.__version__, np.__version__)

_told: set[str] = set()  # what the log has said
_unkept: list[str] = []  # kernels of this process that could not be kept


def unkept() -> list[str]:
    """Names of the kernels that this process compiled and could not keep."""
    return list(_unkept)


class KernelCache(_Cache):
    """The compiled versions of one function; `kind` tells a C function from a kernel of the same name."""

    def __init__(self, function: Callable[..., Any], kind: str = "") -> None:
        code = function.__code__
        source = os.path.abspath(code.co_filename)
        name = f"{os.path.basename(source).removesuffix('.py')}.{function.__qualname__}{kind}"
        self._name = re.sub(r"[^\w.-]", "", name)[:100]
        cells = function.__closure__ or ()
        closure = files.digest(dumps(tuple(cell.cell_contents for cell in cells))) if cells else b""
        self._place = (*ENVIRONMENT, source, kind, closure)
        version = (SOURCES, _version(source), code.co_firstlineno, files.digest(code.co_code))
        self._stamp = files.digest(repr(version).encode())
        self._enabled = True

    @property
    def cache_path(self) -> str | None:
        return kernel_folder() or None

    def _path(self, signature: Any, codegen: Any) -> str:
        """The file of a version, or "" where kernels are not kept. An older version of the sources had the same."""
        if not (self._enabled and (folder := kernel_folder())):
            return ""
        key = files.digest(repr((self._place, str(signature), codegen.magic_tuple())).encode(errors="surrogateescape"))
        return os.path.join(folder, f"{self._name}.{key.hex()}{files.SUFFIX}")

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compiled version, or None where it has to be compiled."""
        target_context.refresh()
        if not (path := self._path(signature, target_context.codegen())):
            return None
        try:
            stamp, pickled = files.read(path)
            if stamp == self._stamp:
                return CompileResult._rebuild(target_context, *pickle.loads(pickled))
        except FileNotFoundError:
            pass
        except MemoryError:
            raise
        except files.TornFile:
            _say_once("torn", f"{path} was torn, by a full disk or a lost node; it is removed and compiled anew")
            with contextlib.suppress(OSError):
                os.unlink(path)
        except Exception as error:  # OSError; or what a pickle raises that another release has made
            _say_once("unreadable", f"{path} cannot be used, its kernel is compiled anew: {error!r}")
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep the compiled version if that is possible."""
        if not (path := self._path(signature, result.codegen)):
            return
        try:
            if result.library.has_dynamic_globals or any(not lifted.can_cache for lifted in result.lifted):
                raise ValueError("it holds addresses of this process")
            files.write(path, self._stamp, dumps(result._reduce()))
        except (OSError, ValueError) as error:
            _unkept.append(self._name)
            _say_once("unkept", f"kernels are compiled for this process alone, {path} cannot be kept: {error}")

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Have all versions compiled anew in this process."""
        self.disable()


@functools.cache
def _version(source: str) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        info = os.stat(source)
        return int(info.st_mtime), info.st_size
    return 0, 0


def _say_once(what: str, text: str) -> None:
    """Say it to the log once a process: with one file the others of a disk go wrong as well."""
    level = logging.DEBUG if what in _told else logging.WARNING
    _told.add(what)
    log.log(level, "%s", text)
