"""torch's tensors through the P2P Store: `torch_tensors.py [MODULE]`, as where MODULE is not installed."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

if len(sys.argv) > 1 and sys.argv[1]:
    sys.modules[sys.argv[1]] = None  # type: ignore[assignment]

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import mooncake_hpc
from mooncake_hpc.core.errors import RegistrationError, SizeMismatch


def dtypes() -> list[torch.dtype]:
    """All that a dense tensor may have."""
    found = []
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        try:
            made = torch.zeros(12 * 16, dtype=torch.uint8).view(dtype)
        except RuntimeError:
            continue  # quantized
        if not made.is_quantized:
            found.append(dtype)
    return sorted(found, key=str)


def filled(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    data = np.random.default_rng(1).integers(0, 2, int(np.prod(shape)) * size, np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def refused(tensor: torch.Tensor, text: str) -> None:
    for call in (engine.register, lambda t: trainer.register("x", {"w": t})):
        try:
            call(tensor)
        except RegistrationError as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"{text}: taken")


all_of_them = dtypes()
assert {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.complex64} <= {*all_of_them}
state = {str(dtype): filled(dtype, 4, 6) for dtype in all_of_them}
state |= {"scalar": filled(torch.bfloat16), "none": filled(torch.float8_e4m3fn, 0, 3)}
state["grad"] = filled(torch.bfloat16, 3).requires_grad_()
state["parameter"] = torch.nn.Parameter(filled(torch.float32, 3))

with (
    mooncake_hpc.TransferEngine("127.0.0.1:1", "memory://t", protocol="tcp") as engine,
    mooncake_hpc.P2PStore("127.0.0.1:2", "memory://t", protocol="tcp") as trainer,
    mooncake_hpc.P2PStore("127.0.0.1:3", "memory://t", protocol="tcp") as reader,
):
    for dtype in all_of_them:
        engine.register(state[str(dtype)])
        engine.unregister(state[str(dtype)])
    manifest = trainer.register("state", state)
    names = {part.name: part.dtype for part in manifest.parts}
    assert names["torch.bfloat16"] == "bfloat16" and names["torch.float8_e4m3fn"] == "float8_e4m3fn"
    assert names["torch.float32"] == "<f4" and names["torch.bool"] == "|b1"
    replica = reader.get_replica("state", timeout=60)
    found = replica.tensors("torch")
    assert all(same(found[name], tensor) for name, tensor in state.items())
    arrays = replica.tensors()
    assert all(arrays[name].tobytes() == raw(tensor) for name, tensor in state.items())
    if "ml_dtypes" in sys.argv:
        assert arrays["torch.bfloat16"].dtype == np.uint8 and arrays["torch.bfloat16"].shape == (4, 6, 2)
    else:
        assert str(arrays["torch.bfloat16"].dtype) == "bfloat16" and arrays["torch.bfloat16"].shape == (4, 6)
    reader.delete_replica("state")
    ours = {
        name: torch.zeros_like(tensor.detach().view(torch.uint8) if tensor.dim() else tensor.detach()).view(
            tensor.dtype
        )
        for name, tensor in state.items()
    }
    reader.get_replica("state", ours, timeout=60)
    assert all(same(ours[name], tensor) for name, tensor in state.items())
    reader.delete_replica("state")
    try:
        reader.get_replica("state", {**ours, "torch.bfloat16": torch.zeros(4, 6, dtype=torch.float16)}, timeout=60)
    except SizeMismatch as error:
        assert "'bfloat16'" in str(error) and "'<f2'" in str(error), error
    else:
        raise AssertionError("a buffer of another dtype was taken")

    refused(torch.zeros(3, device="meta"), "has no bytes")
    refused(torch.eye(3).to_sparse(), "is not dense")
    refused(torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.quint8), "int_repr")
    refused(torch.zeros(3, dtype=torch.complex64).conj(), "resolve_conj")
    refused(filled(torch.bfloat16, 4, 4).T, "not C-contiguous")
    refused(torch.zeros(4, 4).T, "not C-contiguous")

    with tempfile.TemporaryDirectory() as folder:
        file, again = Path(folder) / "a.safetensors", Path(folder) / "b.safetensors"
        model = {name: state[name] for name in ("torch.bfloat16", "torch.float8_e4m3fn", "torch.float16", "torch.bool")}
        save_file(model, file)
        trainer.register("model", load_file(file))
        save_file(reader.get_replica("model", timeout=60).tensors("torch"), again)
        assert all(same(load_file(again)[name], tensor) for name, tensor in model.items())
