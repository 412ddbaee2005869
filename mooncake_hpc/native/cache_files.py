"""Files of compiled kernels: written whole or not at all, read only if they are whole and of this user or root.

    mark, 22 bytes | digest of all that follows, 16 bytes | stamp of what was compiled, 16 bytes | a pickle

A node that loses power leaves files that are empty, short or full of zeros. The digest tells, before anything of the
file is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from hashlib import blake2b

from mooncake_hpc.native.cache_folder import OTHERS_WRITE, ours

MARK = b"mooncake-hpc kernel 1\n"
DIGEST_BYTES = 16
HEAD_BYTES = len(MARK) + 2 * DIGEST_BYTES
SUFFIX, UNFINISHED = ".nbc", ".tmp"
ABANDONED_S = 3600  # an unfinished file of this age has nobody who writes it


class TornFile(Exception):
    """The file is not whole."""


def digest(*parts: bytes | memoryview) -> bytes:
    state = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        state.update(part)
    return state.digest()


def read(path: str) -> tuple[bytes, memoryview]:
    """Return stamp and pickle. Raises TornFile, or OSError where it cannot be read or others could have written it."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or not ours(info) or info.st_mode & OTHERS_WRITE:
            raise PermissionError(1, "others could have written it", path)
        content = memoryview(file.read())
    begin = len(MARK) + DIGEST_BYTES
    if content[: len(MARK)] != MARK or content[len(MARK) : begin] != digest(content[begin:]):
        raise TornFile(path)
    return bytes(content[begin:HEAD_BYTES]), content[HEAD_BYTES:]


def write(path: str, stamp: bytes, pickled: bytes) -> None:
    """Put the file in place, whole. Raises OSError, and leaves nothing then."""
    temporary = f"{path}.{secrets.token_hex(8)}{UNFINISHED}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o644), "wb") as file:
            # a umask of 0 would have others write
            os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~OTHERS_WRITE)
            file.write(MARK + digest(stamp, pickled) + stamp)
            file.write(pickled)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def whole(path: str) -> bool:
    """Whether the file could be loaded, as far as that can be told without numba."""
    try:
        read(path)
    except (OSError, TornFile):
        return False
    return True


def remove_unfinished(folder: str) -> None:
    """Remove what killed processes left behind."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(UNFINISHED) and time.time() - entry.stat().st_mtime > ABANDONED_S:
                os.unlink(entry.path)
