"""Memory files between processes, and what counts as registrable memory."""

from __future__ import annotations

import array
import mmap
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mooncake_hpc.core.errors import RegistrationError
from mooncake_hpc.core.memory import MemoryFile, containing, describe


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def maps(name: str) -> int:
    with open("/proc/self/maps") as file:
        return sum(f"memfd:{name}" in line for line in file)


def test_another_process_maps_the_same_bytes() -> None:
    code = (
        "import sys; from mooncake_hpc.core.memory import MemoryFile\n"
        "m = MemoryFile.attach(int(sys.argv[1])); assert m.array[7] == 9; m.array[8] = 10"
    )
    with MemoryFile(10_000) as memory:
        memory.array[7] = 9
        subprocess.run([sys.executable, "-c", code, str(memory.fd)], pass_fds=[memory.fd], check=True)
        assert memory.array[8] == 10 and memory.nbytes == memory.array.size == 10_000
        assert memory.address == memory.array.ctypes.data


def test_views_outlive_close_and_nothing_is_left_after_them() -> None:
    before = open_descriptors()
    memory = MemoryFile(8192, "outlive")
    view = memory.array[100:200]
    memory.close()
    memory.close()
    view[:] = 5
    assert view.sum() == 500 and maps("outlive") == 1
    with pytest.raises(RegistrationError, match="closed"):
        memory.array.sum()
    with pytest.raises(RegistrationError, match="closed"):
        os.close(memory.fd)
    del view
    assert maps("outlive") == 0 and open_descriptors() == before


def test_a_dropped_memory_file_closes_itself() -> None:
    before = open_descriptors()
    MemoryFile(4096, "dropped")
    assert maps("dropped") == 0 and open_descriptors() == before


def test_nobody_can_resize_it() -> None:
    with MemoryFile(8192) as memory:
        for size in (4096, 16384):
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fd, size)


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 50, 1 << 80])
def test_impossible_sizes_are_named_and_leak_nothing(nbytes: int) -> None:
    before = open_descriptors()
    with pytest.raises(RegistrationError, match=str(nbytes)):
        MemoryFile(nbytes)
    assert open_descriptors() == before


def test_attach_refuses_what_its_sender_could_shrink() -> None:
    before = open_descriptors()
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    with pytest.raises(RegistrationError, match="sealed"):
        MemoryFile.attach(unsealed)
    with pytest.raises(RegistrationError, match="usable"):
        MemoryFile.attach(os.open("/dev/null", os.O_RDONLY))
    assert open_descriptors() == before


def test_describe_buffer_protocol() -> None:
    numbers = np.arange(10, dtype=np.float32).reshape(2, 5)
    view = describe(numbers)
    assert (view.address, view.nbytes, view.readonly) == (numbers.ctypes.data, 40, False)
    assert describe(b"abc").readonly and describe(b"abc").nbytes == 3
    assert not describe(array.array("d", [1.0])).readonly
    assert describe(np.array(1.0)).nbytes == 8
    assert describe(np.arange("2020", "2024", dtype="M8[Y]")).nbytes == 32
    numbers.flags.writeable = False
    assert describe(numbers).readonly


def test_owner_keeps_the_bytes_in_place() -> None:
    growing, region = bytearray(100), mmap.mmap(-1, 4096)
    views = [describe(growing), describe(region)]
    with pytest.raises(BufferError):
        growing.extend(bytes(1000))
    with pytest.raises(BufferError):
        region.close()
    views.clear()
    growing.extend(b"x")
    region.close()


class Interface:
    """Nothing but `__array_interface__`."""

    def __init__(self, inner: np.ndarray) -> None:
        self.inner = inner
        self.__array_interface__ = inner.__array_interface__


class Tensor:
    """A tensor of a library that speaks DLPack: 1.0, or as before it, without `max_version`."""

    def __init__(self, inner: np.ndarray, *, old: bool = False, device: int = 1) -> None:
        self.inner, self.old, self.device = inner, old, device

    def __dlpack__(self, **options: Any) -> Any:
        if not self.old:
            return self.inner.__dlpack__(**options)
        if options:
            raise TypeError("unexpected keyword argument")
        return self.inner.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0


@pytest.mark.parametrize("wrap", [Interface, Tensor, lambda a: Tensor(a, old=True)])
def test_describe_other_protocols(wrap: Any) -> None:
    inner = np.arange(12.0)
    view = describe(wrap(inner))
    assert (view.address, view.nbytes, view.readonly) == (inner.ctypes.data, 96, False)
    with pytest.raises(RegistrationError, match="contiguous"):
        describe(wrap(inner[::2]))


@pytest.mark.parametrize("wrap", [Interface, Tensor])
def test_read_only_exports_are_read_only(wrap: Any) -> None:
    inner = np.arange(12.0)
    inner.flags.writeable = False
    assert describe(wrap(inner)).readonly


def test_device_memory_is_refused() -> None:
    with pytest.raises(RegistrationError, match=r"device \(2, 0\)"):
        describe(Tensor(np.arange(3), device=2))


@pytest.mark.parametrize(
    ("obj", "match"),
    [
        (b"", "empty"),
        (np.zeros((0, 3)), "empty"),
        (np.zeros(10)[::2], "contiguous"),
        (np.zeros((3, 4)).T, "contiguous"),
        (memoryview(b"abcd")[::2], "contiguous"),
        (np.array([object()]), "Python objects"),
        (3, "buffer protocol"),
        ("text", "buffer protocol"),
    ],
)
def test_what_cannot_be_registered(obj: object, match: str) -> None:
    with pytest.raises(RegistrationError, match=match):
        describe(obj)


def test_containing_finds_open_files_by_address() -> None:
    with MemoryFile(8192) as memory, MemoryFile(4096) as other:
        closed: list[int] = []
        memory.at_close(closed.append)
        view = memory.array[10:]
        assert containing(view.ctypes.data, view.nbytes) is memory
        assert containing(other.address, 4096) is other
        assert containing(view.ctypes.data, 8192) is None
        assert containing(np.zeros(8).ctypes.data, 8) is None
        memory.close()
        assert containing(view.ctypes.data, view.nbytes) is None and closed == [memory.serial]
