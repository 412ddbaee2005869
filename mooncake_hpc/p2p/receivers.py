"""Where an object goes: the buffers that a caller brought for it, or memory of the engine's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mooncake_hpc.core.errors import SizeMismatch
from mooncake_hpc.engine.engine import TransferEngine
from mooncake_hpc.p2p.buffers import as_bytes, check_receiver, some, take_apart
from mooncake_hpc.p2p.layout import Bytes
from mooncake_hpc.p2p.manifest import TENSORS, Manifest, by_name


def receivers(engine: TransferEngine, manifest: Manifest, out: object) -> tuple[list[object], list[Bytes]]:
    """The buffers to receive the object, and as bytes. Tensors go into buffers of the same dtype and shape, or into
    plain bytes. Raises SizeMismatch."""
    if out is None:
        if not manifest.size:
            return [], [np.zeros(0, np.uint8) for _ in manifest.sizes]
        whole = engine.allocate(manifest.size, writable_by_peers=False)
        return [whole], np.split(whole, np.cumsum(manifest.sizes)[:-1])
    if isinstance(out, Mapping):
        if manifest.kind != TENSORS:
            raise SizeMismatch(f"object {manifest.name!r} consists of {manifest.kind}, not of named tensors")
        buffers = by_name(manifest.parts, out)
    else:
        buffers, _, _ = take_apart(out)
    if manifest.kind == TENSORS and len(buffers) == len(manifest.parts):
        for part, nbytes, buffer in zip(manifest.parts, manifest.sizes, buffers, strict=True):
            check_receiver(manifest.name, part, nbytes, buffer)
    arrays = [as_bytes(buffer, write=True) for buffer in buffers]
    sizes = tuple(array.nbytes for array in arrays)
    if sizes != manifest.sizes:
        raise SizeMismatch(
            f"object {manifest.name!r} has {len(manifest.sizes)} buffers of {some(manifest.sizes)} bytes, but "
            f"{len(sizes)} of {some(sizes)} were given"
        )
    return buffers, arrays


def range_receiver(manifest: Manifest, out: object, begin: int, end: int) -> Bytes:
    """Where bytes `begin` to `end` of the object go. Raises SizeMismatch."""
    if not 0 <= begin <= end <= manifest.size:
        raise SizeMismatch(f"object {manifest.name!r} has {manifest.size} bytes: there is no range {begin} to {end}")
    target = as_bytes(out, write=True) if out is not None else np.empty(end - begin, np.uint8)
    if target.nbytes != end - begin:
        raise SizeMismatch(f"a range of {end - begin} bytes does not fit a buffer of {target.nbytes}")
    return target
