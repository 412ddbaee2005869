"""Memory that can be registered: shared-memory files of our own, and a view of whatever the caller brings.

A `MemoryFile` is a memfd: it has no name in /dev/shm, so nothing is left behind when its holders are killed.
It is sealed against resizing, so that no holder can make another one die of SIGBUS (memfd_create(2)).
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.errors import RegistrationError
from mooncake_hpc.core.tensors import check_plain, expose, type_name

Bytes = npt.NDArray[np.uint8]

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_serials = itertools.count(1)
_open: weakref.WeakValueDictionary[int, MemoryFile] = weakref.WeakValueDictionary()


class MemoryFile:
    """`nbytes` bytes of zeroed shared memory in this process, which other processes map through `fd`.

    Views of `array` keep the mapping alive: `close()` gives up this object's share of it, and the memory goes
    back to the system with the last view and the last descriptor. A context manager.
    """

    def __init__(self, nbytes: int, name: str = "mooncake") -> None:
        """Allocate; /proc/PID/maps shows `name`. Raises RegistrationError if the system has not as much."""
        _check_size(nbytes)
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, nbytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SIZE_SEALS | fcntl.F_SEAL_SEAL)
            self._map(nbytes)
        except (OSError, OverflowError, ValueError) as error:
            self.close()
            raise RegistrationError(f"cannot allocate {nbytes} bytes of shared memory: {error}") from error

    @classmethod
    def attach(cls, fd: int) -> MemoryFile:
        """Map the memory file behind a received descriptor; the new object owns it, and a failure closes it.

        Raises RegistrationError when `fd` is no memory file sealed against resizing, or cannot be mapped.
        """
        self = cls.__new__(cls)
        self._fd = fd
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SIZE_SEALS != SIZE_SEALS:
                raise OSError("it is not sealed against resizing")
            self._map(os.fstat(fd).st_size)
        except (OSError, OverflowError, ValueError) as error:
            self.close()
            raise RegistrationError(f"descriptor {fd} is no usable memory file: {error}") from error
        return self

    def _map(self, nbytes: int) -> None:
        self._array: Bytes | None = np.frombuffer(mmap.mmap(self._fd, nbytes), np.uint8)
        self.address = int(self._array.ctypes.data)
        self.nbytes = nbytes
        self.serial = next(_serials)  # no other memory file of this process ever has it
        self._at_close: list[Callable[[int], object]] = []
        _open[self.serial] = self

    @property
    def array(self) -> Bytes:
        """All bytes, writable. Raises RegistrationError once closed."""
        if self._array is None:
            raise RegistrationError("this memory file is closed")
        return self._array

    @property
    def closed(self) -> bool:
        return self._fd < 0

    @property
    def fd(self) -> int:
        """The descriptor to hand to other processes. Raises RegistrationError once closed."""
        if self._fd < 0:
            raise RegistrationError("this memory file is closed")
        return self._fd

    def close(self) -> None:
        """Give up the descriptor and this object's share of the mapping. Idempotent; views stay valid."""
        fd, self._fd, self._array = self._fd, -1, None
        if fd < 0:
            return
        os.close(fd)
        if hasattr(self, "serial"):
            _open.pop(self.serial, None)
            while self._at_close:
                self._at_close.pop()(self.serial)

    def at_close(self, callback: Callable[[int], object]) -> None:
        """Have `callback(serial)` called by `close()`; it may be any thread, and must not raise."""
        self._at_close.append(callback)

    def __enter__(self) -> MemoryFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()


def data_address(array: npt.NDArray[Any]) -> int:
    """Where its first element is; as `array.ctypes.data`, which takes ten times as long."""
    address: int = array.__array_interface__["data"][0]
    return address


def containing(address: int, nbytes: int) -> MemoryFile | None:
    """The open memory file of this process in which these bytes lie."""
    for reference in _open.valuerefs():
        file = reference()
        if file is not None and file.address <= address and address + nbytes <= file.address + file.nbytes:
            return file
    return None


def _check_size(nbytes: int) -> None:
    if nbytes <= 0:
        raise RegistrationError(f"cannot allocate {nbytes} bytes: the size must be above 0")
    # ftruncate reserves nothing: too large a file would succeed here, and whoever touches it be killed
    have = system_memory()
    if nbytes > have:
        raise RegistrationError(f"cannot allocate {nbytes} bytes: memory and swap are {have} bytes")


def system_memory(swap: bool = True) -> int:
    """Bytes of memory, and of `swap`, that a process here may have: the machine's, or the limit of its cgroup."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    keys = ("MemTotal", "SwapTotal") if swap else ("MemTotal",)
    return min(sum(int(fields[key].split()[0]) * 1024 for key in keys), *_cgroup_limits())


def _cgroup_limits() -> Iterator[int]:
    """The memory limits of our cgroup and of those above it, of version 2 or 1 (cgroups(7))."""
    yield sys.maxsize
    lines: list[list[str]] = []
    with contextlib.suppress(FileNotFoundError), open("/proc/self/cgroup", errors="surrogateescape") as file:
        lines = [line.rstrip("\n").split(":", 2) for line in file]
    for _, controllers, path in lines:
        if controllers not in ("", "memory"):
            continue
        root, name = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
        folder = Path("/sys/fs/cgroup", root)
        for above in (path, *map(str, PurePosixPath(path).parents)):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                yield int((folder / above.lstrip("/") / name).read_text())


@dataclass(frozen=True, slots=True)
class MemoryView:
    """Where an object's bytes are. `owner` keeps them there for as long as it is held."""

    address: int
    nbytes: int
    readonly: bool
    owner: object


def describe(obj: object) -> MemoryView:
    """The bytes of anything with the buffer protocol, `__array_interface__`, or `__dlpack__` in host memory, and of
    every dense tensor of torch's there, whatever its dtype.

    Raises RegistrationError when there are none, or they are not C-contiguous, or lie on a device, or hold
    Python objects.
    """
    owner: object
    if isinstance(obj, np.ndarray):
        owner, array, readonly = obj, obj, not obj.flags.writeable
    else:
        array, owner, readonly, _, _ = expose(obj)
    if array.nbytes == 0:
        raise RegistrationError(f"{type_name(obj)} is empty: there is nothing to register")
    check_plain(array, type_name(obj))
    return MemoryView(int(array.ctypes.data), array.nbytes, readonly, owner)
