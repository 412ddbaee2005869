"""Files that hold a secret: nobody else may read or have written them."""

from __future__ import annotations

import os
import stat

from mooncake_hpc.core.errors import ConfigError


def read_private(path: str, where: str, limit: int) -> bytes:
    """The file's bytes without one newline at the end, `limit` at most and what shows that there are more.

    Raises ConfigError, with `where` for its name, unless it is a regular file of ours or root's with mode 0600 or less.
    """
    try:
        # non-blocking: a FIFO without a writer would wait for one
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            _check_private(os.fstat(fd), where)
            return os.read(fd, limit + 2).removesuffix(b"\n")
        finally:
            os.close(fd)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        cause = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{where} cannot be read: {cause}") from None


def _check_private(found: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{where} is no regular file")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{where} belongs to the user id {found.st_uid}; it must be ours or root's")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(f"{where} has the mode {mode:04o}: others may use it; say chmod 600")
