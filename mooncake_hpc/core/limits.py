"""Limits of the process and the machine: descriptors, threads, memory, disk. To meet one is a LimitError."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from mooncake_hpc.core.errors import LimitError, MooncakeError

REMEDIES = {
    errno.EMFILE: "this process has as many open files as it may: raise `ulimit -n`",
    errno.ENFILE: "this machine has as many open files as it may: raise fs.file-max",
    errno.ENOMEM: "no memory is left: see `ulimit -v`, `ulimit -l` and the memory limit of the cgroup",
    errno.ENOSPC: "no space is left: see `df` of the folder, and of /dev/shm",
    errno.EDQUOT: "the disk quota is used up: see `quota`",
    errno.EFBIG: "a file may not grow that large: see `ulimit -f`",
    errno.EAGAIN: "no further process or thread can be started: see `ulimit -u` and the pids limit of the cgroup",
}


def limit_error(error: BaseException, what: str) -> LimitError | None:
    """The LimitError that `error` stands for, met while doing `what`; None where it is of another kind."""
    if isinstance(error, MooncakeError):
        return None
    code = None
    if isinstance(error, MemoryError):
        code = errno.ENOMEM
    elif isinstance(error, OSError):
        code = error.errno
    elif isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        code = errno.EAGAIN
    if code not in REMEDIES:
        return None
    name = getattr(error, "filename", None)
    return LimitError(f"{what}{f' ({name})' if name else ''}: {REMEDIES[code]}")


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """Inside, what the system refuses for a limit is raised as LimitError."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if (limit := limit_error(error, what)) is not None:
            raise limit from error
        raise
