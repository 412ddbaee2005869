"""Tensors of every dtype: published under its name, received as what they were, or as bytes where that is asked for."""

from __future__ import annotations

import importlib.util
import mmap
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, clean_env
from safetensors.numpy import load_file, save_file
from test_store import SHARD, Open, content, opener  # noqa: F401 - a fixture

from mooncake_hpc.core.errors import ConfigError, ObjectExists, SizeMismatch
from mooncake_hpc.core.memory import describe
from mooncake_hpc.core.tensors import as_numpy, as_torch, expose, numpy_dtype
from mooncake_hpc.p2p.fetch_files import fetch_path
from mooncake_hpc.p2p.manifest import Manifest
from mooncake_hpc.p2p.register_files import register_path

OTHERS = sorted(
    name for name, kind in vars(ml_dtypes).items() if isinstance(kind, type) and issubclass(kind, np.generic)
)
NUMPYS = ["?", "i1", "u2", "<i4", ">f4", "f2", "f8", "c8", "c16", "M8[s]", "S5", "U3"]


def tensor(dtype: Any, shape: tuple[int, ...] = (3, 5)) -> np.ndarray:
    nbytes = np.dtype(dtype).itemsize * int(np.prod(shape))
    return content(nbytes, 7).view(np.uint8).view(dtype).reshape(shape)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", OTHERS)
def test_dtypes_of_ml_dtypes(name: str) -> None:
    array = tensor(numpy_dtype(name))
    exposed, view = expose(array), describe(array)
    assert (exposed.dtype, exposed.shape, exposed.readonly) == (name, (3, 5), False)
    assert (view.address, view.nbytes) == (array.ctypes.data, array.nbytes)
    assert same(as_numpy(array.reshape(-1).view(np.uint8), name, (3, 5)), array)


def test_a_dtype_that_nobody_has() -> None:
    data = content(24)
    seen = as_numpy(data, "float9_of_tomorrow", (2, 3))
    assert seen.dtype == np.uint8 and seen.shape == (2, 3, 4) and seen.ctypes.data == data.ctypes.data
    assert as_numpy(content(4), "float9_of_tomorrow", ()).shape == (4,)
    assert as_numpy(content(0), "float9_of_tomorrow", (0, 3)).shape == (0, 3, 0)


def test_state_dicts_of_all_dtypes(opener: Open) -> None:  # noqa: F811
    trainer, reader = opener(), opener()
    state = {dtype: tensor(dtype) for dtype in NUMPYS} | {name: tensor(numpy_dtype(name)) for name in OTHERS}
    state |= {"scalar": tensor(ml_dtypes.bfloat16, ()), "none": tensor(ml_dtypes.bfloat16, (0, 4))}
    manifest = trainer.register("state", state)
    assert Manifest.from_json(manifest.to_json(), "here").parts == manifest.parts
    assert {part.dtype for part in manifest.parts} > {*OTHERS, "<f2", "|b1", "<c8"}
    found = reader.get_replica("state", timeout=60).tensors()
    assert all(same(found[name], array) for name, array in state.items())
    reader.delete_replica("state")
    ours = {name: np.zeros_like(array) for name, array in state.items()}
    reader.get_replica("state", ours, timeout=60)
    assert all(same(ours[name], array) for name, array in state.items())


def test_buffers_of_another_dtype_or_shape_are_refused(opener: Open) -> None:  # noqa: F811
    trainer, reader = opener(), opener()
    weights, bias = tensor(ml_dtypes.bfloat16, (8, 4)), tensor(np.float32, (6,))
    trainer.register("m", {"w": weights, "b": bias})
    good = np.zeros(6, np.float32)
    for wrong in (
        np.zeros((8, 4), np.float16), np.zeros((4, 8), ml_dtypes.bfloat16), np.zeros((8, 4), np.uint16),
        np.zeros(32, ml_dtypes.bfloat16), np.zeros((8, 8), np.uint8), np.zeros(63, np.uint8), np.zeros(0, np.uint8),
        np.zeros(64, np.int8), np.zeros((8, 5), ml_dtypes.bfloat16),
    ):  # fmt: skip
        for out in ({"w": wrong, "b": good}, [wrong, good]):
            with pytest.raises(
                SizeMismatch, match=r"'m': 'w' is a tensor of dtype 'bfloat16' and shape \(8, 4\)"
            ) as it:
                reader.get_replica("m", out, timeout=60)
            assert f"{wrong.shape}" in str(it.value)
    assert reader.list()[0].holders.keys() == {trainer.name}
    for plain in (np.zeros(64, np.uint8), bytearray(64), memoryview(bytearray(64)), mmap.mmap(-1, 64)):
        reader.get_replica("m", {"w": plain, "b": good}, timeout=60)
        assert bytes(plain) == weights.tobytes() and np.array_equal(good, bias)
        reader.delete_replica("m")


def test_what_an_earlier_version_has_published(opener: Open) -> None:  # noqa: F811
    """It wrote what numpy says of other libraries' dtypes: how large they are."""
    trainer, reader = opener(), opener()
    weights = tensor(ml_dtypes.bfloat16, (8, 4))
    trainer.register("m", {"w": weights.view("V2")})
    for out in (np.zeros((8, 4), ml_dtypes.bfloat16), np.zeros((8, 4), np.uint16)):
        reader.get_replica("m", {"w": out}, timeout=60)
        assert out.tobytes() == weights.tobytes()
        reader.delete_replica("m")
    with pytest.raises(SizeMismatch):
        reader.get_replica("m", {"w": np.zeros((8, 4), np.uint8)}, timeout=60)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: mmap.mmap(-1, len(data))])
def test_objects_that_are_no_arrays_are_served_in_place(opener: Open, kind: Any) -> None:  # noqa: F811
    trainer, reader = opener(), opener()
    data = kind(content(3 * SHARD + 7).tobytes())
    trainer.register("o", data, shard_size=SHARD)
    assert reader.get_replica("o", timeout=60).arrays[0].tobytes() == bytes(data)


def test_a_replica_does_not_make_its_reader_the_owner(opener: Open) -> None:  # noqa: F811
    trainer, reader, other = opener(), opener(), opener()
    old, new = content(3 * SHARD), content(3 * SHARD, 2)
    version = trainer.register("o", old, shard_size=SHARD).version
    reader.get_replica("o", timeout=60)
    with pytest.raises(ObjectExists, match=r"force=True"):
        reader.register("o", new, shard_size=SHARD)
    assert np.array_equal(other.get_replica("o", timeout=60).arrays[0], old), "nothing has changed"
    trainer.close()
    deadline = time.monotonic() + 30
    while {holder for one in reader.list() for holder in one.holders} != {reader.name, other.name}:
        assert time.monotonic() < deadline, "neither replica keeps the object alive"
        time.sleep(0.01)
    with pytest.raises(ObjectExists, match=r"force=True"):
        reader.register("o", new, shard_size=SHARD)
    assert reader.register("o", old.copy(), shard_size=SHARD).version == version, "equal: it is one more trainer"
    assert reader.register("o", new, shard_size=SHARD).version != version
    other.delete_replica("o")
    assert np.array_equal(other.get_replica("o", timeout=60).arrays[0], new)


def test_safetensors_of_all_dtypes(opener: Open, tmp_path: Path) -> None:  # noqa: F811
    """As a file, whose bytes are what they are, and as tensors."""
    trainer, reader = opener(), opener()
    state = {name: tensor(dtype) for name, dtype in (("half", "f2"), ("brain", ml_dtypes.bfloat16), ("flag", "?"))}
    save_file(state, tmp_path / "model.safetensors")
    register_path(trainer, "file", str(tmp_path / "model.safetensors"))
    fetch_path(reader, "file", str(tmp_path / "out.safetensors"), timeout=60)
    trainer.register("tensors", load_file(tmp_path / "out.safetensors"))
    found = reader.get_replica("tensors", timeout=60).tensors()
    save_file(found, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(same(again[name], array) and same(found[name], array) for name, array in state.items())


def test_names_that_are_one_as_text(opener: Open) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="two tensors are named '1'"):
        opener().register("m", {1: tensor("f4"), "1": tensor("f4")})


def test_frameworks(opener: Open) -> None:  # noqa: F811
    trainer = opener()
    trainer.register("m", {"w": tensor("f4")})
    trainer.register("b", tensor("f4"))
    with pytest.raises(ConfigError, match="'jax' is none of numpy, torch"):
        opener().get_replica("m", timeout=60).tensors("jax")
    with pytest.raises(ConfigError, match="consists of buffers"):
        opener().get_replica("b", timeout=60).tensors()


@pytest.fixture
def torch() -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("hardware: a machine without torch")


@pytest.mark.slow
@pytest.mark.parametrize("without", ["", "ml_dtypes"])
def test_torch(torch: None, without: str) -> None:
    """In a process of its own: torch starts threads."""
    program = str(ROOT / "tests" / "p2p" / "torch_tensors.py")
    done = subprocess.run([sys.executable, "-P", program, without], env=clean_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_is_not_imported_for_others() -> None:
    code = "import sys, numpy; from mooncake_hpc.core.tensors import expose; expose(numpy.zeros(3)); expose(b'x')"
    code += "; assert not {'torch', 'ml_dtypes'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-P", "-c", code], env=clean_env(), check=True)


def test_torch_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="need the package torch"):
        as_torch(content(8), "bfloat16", (4,))
    assert expose(content(8)).shape == (8,)
