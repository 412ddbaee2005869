"""Arrays and tensors of any library: an array over their memory, and the name and shape of what lies there.

A dtype has a name: numpy's `dtype.str` for what numpy has itself ("<f4"), else the library's ("bfloat16",
"float8_e4m3fn"), which torch and ml_dtypes share. No library is imported here unless its dtype is asked for: an object
brings its own.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.errors import ConfigError, RegistrationError

Bytes = npt.NDArray[np.uint8]

HOST_DEVICES = {1: "CPU", 3: "CUDA pinned host", 11: "ROCm pinned host"}  # DLDeviceType in dlpack.h
USER_REGISTERED = 2  # numpy.dtype.isbuiltin of another library's dtypes


class Exposed(NamedTuple):
    """An object's memory. `array` lies over it, as bytes in one dimension where numpy has no such dtype; `owner` keeps
    it there."""

    array: npt.NDArray[Any]
    owner: object
    readonly: bool
    dtype: str
    shape: tuple[int, ...]

    @property
    def flat_bytes(self) -> bool:
        """Whether these are plain bytes, in one dimension."""
        return self.dtype == "|u1" and len(self.shape) == 1


def expose(obj: Any) -> Exposed:
    """The memory of anything with the buffer protocol, `__array_interface__`, or `__dlpack__` in host memory, and of
    every dense tensor of torch's there. Raises RegistrationError when there is none."""
    if isinstance(obj, np.ndarray):
        return _of_array(obj, obj, not obj.flags.writeable)
    if _is_torch_tensor(obj):
        return _of_torch(obj)
    try:
        view = memoryview(obj)  # while it is held, a bytearray refuses to be resized and an mmap to be closed
    except TypeError:
        pass
    else:
        return _of_array(np.asarray(view), view, view.readonly)
    if hasattr(obj, "__array_interface__"):
        array = np.asarray(obj)
        return _of_array(array, (obj, array), not array.flags.writeable)
    if hasattr(obj, "__dlpack__"):
        array = _from_dlpack(obj)
        return _of_array(array, (obj, array), _tells_readonly(obj) and not array.flags.writeable)
    hint = "; it lies on a GPU: copy it to host memory" if hasattr(obj, "__cuda_array_interface__") else ""
    raise RegistrationError(f"{type(obj)!r} has none of the buffer protocol, __array_interface__ and __dlpack__{hint}")


def check_plain(array: npt.NDArray[Any], what: str) -> None:
    """Raise RegistrationError unless the array's bytes are numbers, one after the other."""
    if array.dtype.hasobject:
        raise RegistrationError(f"{what} holds Python objects: register arrays of plain numbers")
    if not array.flags.c_contiguous:
        raise _not_contiguous(what, array.shape)


def type_name(obj: object) -> str:
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.isbuiltin == USER_REGISTERED else dtype.str


def numpy_dtype(name: str) -> np.dtype[Any] | None:
    """The dtype of this name: numpy's, or that of ml_dtypes where it is installed. None where there is none."""
    try:
        return np.dtype(name)
    except TypeError:
        pass
    try:
        import ml_dtypes
    except ImportError:
        return None
    found = getattr(ml_dtypes, name, None)
    return np.dtype(found) if isinstance(found, type) else None


def as_numpy(data: Bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The bytes as an array of that dtype and shape. Where nobody here has the dtype: as bytes, in one dimension more,
    which runs over the bytes of an element."""
    known = numpy_dtype(dtype)
    if known is None:
        return data.reshape(*shape, data.nbytes // max(1, math.prod(shape)))
    return data.view(known).reshape(shape)


def as_torch(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Any:
    """The bytes as a tensor of torch's. ConfigError where it is not installed, or has no such dtype."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"tensors of torch's need the package torch: {error}") from error
    known = None if dtype[:1] in "<>|=" else getattr(torch, dtype, None)
    if known is None and (ours := numpy_dtype(dtype)) is not None and ours.isnative:
        known = getattr(torch, ours.name, None)
    if not isinstance(known, torch.dtype):
        raise ConfigError(f"torch {torch.__version__} has no dtype for {dtype!r}")
    return torch.from_numpy(data).view(known).reshape(shape)


def _of_array(array: npt.NDArray[Any], owner: object, readonly: bool) -> Exposed:
    return Exposed(array, owner, readonly, dtype_name(array.dtype), array.shape)


def _is_torch_tensor(obj: object) -> bool:
    kind = getattr(sys.modules.get("torch"), "Tensor", None)
    return isinstance(kind, type) and isinstance(obj, kind)


def _of_torch(tensor: Any) -> Exposed:
    torch, what, shape = sys.modules["torch"], type_name(tensor), tuple(int(n) for n in tensor.shape)
    if hint := _no_plain_memory(tensor):
        raise RegistrationError(f"{what} of shape {shape} and dtype {tensor.dtype} {hint}")
    if not tensor.is_contiguous():
        raise _not_contiguous(what, shape)
    try:
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    except Exception as error:  # whatever its subclasses raise
        raise RegistrationError(f"{what} of shape {shape} has no memory of its own: {error}") from error
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        known = np.dtype(name)
    except TypeError:
        return Exposed(data, (tensor, data), False, name, shape)
    array = data.view(known).reshape(shape)
    return Exposed(array, (tensor, data), False, dtype_name(known), shape)


def _no_plain_memory(tensor: Any) -> str:
    """Why a tensor of torch's is not plain bytes in host memory, and what to do; "" if it is."""
    if tensor.device.type == "meta":
        return "is on the device meta: it has no bytes"
    if tensor.device.type != "cpu":
        return f"lies on device {tensor.device}, not in host memory: copy it (tensor.cpu())"
    if tensor.is_quantized:
        return "is quantized: register its tensor.int_repr(), and its scales apart"
    if str(tensor.layout) != "torch.strided" or tensor.is_nested:
        return f"is not dense ({tensor.layout}): register its parts, or tensor.to_dense()"
    if tensor.is_conj() or tensor.is_neg():
        return "is a view whose values differ from its bytes: register tensor.resolve_conj().resolve_neg()"
    return ""


def _not_contiguous(what: str, shape: tuple[int, ...]) -> RegistrationError:
    return RegistrationError(
        f"{what} of shape {shape} is not C-contiguous: register the array that it is a view of, "
        "or a contiguous copy (numpy.ascontiguousarray, tensor.contiguous())"
    )


def _from_dlpack(obj: Any) -> npt.NDArray[Any]:
    kind, number = obj.__dlpack_device__()
    if int(kind) not in HOST_DEVICES:
        raise RegistrationError(
            f"{type(obj)!r} lies on DLPack device ({int(kind)}, {number}), not in host memory: copy it"
        )
    try:
        return np.from_dlpack(obj)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise RegistrationError(
            f"{type(obj)!r} cannot be exported: {error}; register a view of it as bytes (uint8)"
        ) from error


def _tells_readonly(obj: Any) -> bool:
    """Whether `obj` speaks DLPack 1.0, which has a read-only flag. Older ones all look read-only."""
    try:
        return "dltensor_versioned" in repr(obj.__dlpack__(max_version=(1, 0)))
    except TypeError:
        return False
