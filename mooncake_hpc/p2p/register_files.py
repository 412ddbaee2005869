"""Files and folders as objects. What is published is a copy in memory: a change of a file reaches nobody."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mooncake_hpc.core.errors import P2PError
from mooncake_hpc.p2p.digests import DEFAULT
from mooncake_hpc.p2p.layout import Bytes
from mooncake_hpc.p2p.manifest import FILE, FOLDER, Manifest, Part
from mooncake_hpc.p2p.store import P2PStore

CHUNK = 64 << 20  # bytes of one read: Ctrl-C is noticed between two


def register_path(
    store: P2PStore, name: str, path: str, *, shard_size: int = 0, algorithm: str = DEFAULT, force: bool = False
) -> Manifest:
    """Publish a copy of a file, or of a folder: all its files, with relative names and permissions, and folders. Links
    to files count as files. Raises P2PError for what cannot be read or is neither, and as `P2PStore.register`."""
    root = Path(path)
    kind = FOLDER if root.is_dir() else FILE
    files = _files(root)
    parts, sizes = _describe(root, files)
    whole = store.allocate(sum(sizes)) if sum(sizes) else np.zeros(0, np.uint8)
    buffers = np.split(whole, np.cumsum(sizes)[:-1])
    try:
        for file, buffer in zip(files, buffers, strict=True):
            if buffer.nbytes:
                _read(file, buffer)
        return store.register(
            name,
            buffers,
            shard_size=shard_size,
            algorithm=algorithm,
            force=force,
            kind=kind,
            parts=parts,
            owned=[whole] if whole.nbytes else [],
        )
    except BaseException:
        if whole.nbytes:
            with contextlib.suppress(P2PError, ValueError):
                store.engine.unregister(whole)
        raise


def _files(root: Path) -> list[Path]:
    if not root.is_dir():
        if not root.is_file():
            raise P2PError(f"{root} is neither a file nor a folder")
        return [root]
    found = sorted(root.rglob("*"))
    for path in found:
        if not path.is_file() and (path.is_symlink() or not path.is_dir()):
            raise P2PError(f"{path} is neither a file, nor a link to one, nor a folder: it cannot be published")
    if not any(path.is_file() for path in found):
        raise P2PError(f"folder {root} holds no file")
    return [path for path in found if path.is_file() or not any(path.iterdir())]


def _describe(root: Path, files: Sequence[Path]) -> tuple[list[Part], list[int]]:
    """The parts of the files and folders, and their sizes."""
    parts, sizes = [], []
    try:
        for file in files:
            status, folder = os.stat(file), file.is_dir()
            name = file.relative_to(root).as_posix() if file != root else root.name
            parts.append(Part(name + "/" * folder, mode=stat.S_IMODE(status.st_mode)))
            sizes.append(0 if folder else status.st_size)
    except OSError as error:
        raise P2PError(f"{error.filename} cannot be read: {error}") from error
    return parts, sizes


def _read(path: Path, buffer: Bytes) -> None:
    try:
        with open(path, "rb", buffering=0) as file:
            at = 0
            while at < buffer.nbytes:
                got = file.readinto(buffer[at : at + CHUNK].data)
                if not got:
                    raise P2PError(f"{path} became shorter while it was read: {at} of {buffer.nbytes} bytes")
                at += got
    except OSError as error:
        raise P2PError(f"{path} cannot be read: {error}") from error
