"""Where compiled kernels are kept: the one place that decides on the folder, and on whom to trust with it.

Kernels are unpickled when they are loaded, so whoever can write to their folder runs code as this user. The first of
these that can be trusted is taken:

1. NUMBA_CACHE_DIR, where it is set
2. XDG_CACHE_HOME/mooncake_hpc/kernels, or .cache/mooncake_hpc/kernels in the home folder
3. none: kernels are compiled in each process

A folder that is missing is made, for this user alone. One that cannot be written serves those that read it.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

log = logging.getLogger(__name__)

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
LINKS = 40  # followed at most, as by Linux


@dataclass(frozen=True, slots=True)
class Choice:
    """The folder, "" for none, and a line for each one that was passed over."""

    path: str
    notes: tuple[str, ...]


@functools.cache
def kernel_folder() -> str:
    """Choose for this process; "" where there is no folder. What is wrong is logged once, with the remedy."""
    choice = choose(os.environ)
    for note in choice.notes:
        log.warning("%s", note)
    return choice.path


def choose(env: Mapping[str, str]) -> Choice:
    """Find the folder by the rule above, and make it if it is missing."""
    notes: list[str] = []
    for name, path, remedy in _candidates(env):
        try:
            _make(path)
            problem = distrust(path)
        except OSError as error:
            problem = f"{error.filename or path}: {error.strerror}"
        if not problem:
            return Choice(path, tuple(notes))
        notes.append(f"compiled kernels are not kept in {name}={path}: {problem}; {remedy}")
    notes.append(
        "compiled kernels are kept nowhere, so each process compiles its own: set NUMBA_CACHE_DIR to a private folder"
    )
    return Choice("", tuple(notes))


def _candidates(env: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Variable, path and what to do where the path will not do."""
    if path := env.get("NUMBA_CACHE_DIR"):
        yield "NUMBA_CACHE_DIR", os.path.abspath(path), "name a folder that only you can write to (mode 0700)"
    name, base = "XDG_CACHE_HOME", env.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: others are ignored
        name, base = "HOME", os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(base):
        yield name, os.path.join(base, "mooncake_hpc", "kernels"), "set NUMBA_CACHE_DIR to a folder of your own"


def _make(path: str) -> None:
    """Make the folder and those above it, for this user alone whatever the umask is."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for each in reversed(missing):
        try:
            os.mkdir(each, 0o700)
        except FileExistsError:  # another process was faster
            continue


def distrust(path: str) -> str:
    """Say why code from `path` must not be run; "" where it may. Raises OSError where it cannot be looked at.

    The folder is this user's or root's, no link, and nobody else can write to it; nor to those above it, up to a sticky
    or root's one, as whoever can write there can put another in its place.
    """
    above: list[tuple[str, os.stat_result]] = []
    for at, info in _steps(path):
        if stat.S_ISLNK(info.st_mode):
            if at == path:
                return f"{at} is a link; name the folder itself"
            if not ours(info):
                return f"{at} is a link of user {info.st_uid}"
        else:
            above.append((at, info))
    at, info = above.pop()
    if not stat.S_ISDIR(info.st_mode):
        return f"{at} is no folder"
    if not ours(info):
        return f"{at} belongs to user {info.st_uid}"
    if info.st_mode & OTHERS_WRITE:
        return f"others can write to {at} (mode {stat.S_IMODE(info.st_mode):04o}; chmod go-w)"
    for at, info in reversed(above):
        if info.st_mode & stat.S_ISVTX:
            break
        writers = stat.S_IWOTH if info.st_uid == 0 else OTHERS_WRITE
        if info.st_mode & writers:
            return f"others can write to {at} above it (mode {stat.S_IMODE(info.st_mode):04o}; chmod go-w)"
        if info.st_uid == 0:
            break
    return ""


def ours(info: os.stat_result) -> bool:
    """Whether it belongs to this user or to root."""
    return info.st_uid in (os.geteuid(), 0)


def _steps(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Walk an absolute path from the root, through the links in it: each step and what is there."""
    at, rest, links = "/", path.split("/")[::-1], 0
    while rest:
        name = rest.pop()
        if name in ("", ".", ".."):
            at = os.path.dirname(at) if name == ".." else at
            continue
        step = os.path.join(at, name)
        info = os.lstat(step)
        yield step, info
        if not stat.S_ISLNK(info.st_mode):
            at = step
            continue
        if (links := links + 1) > LINKS:
            raise OSError(40, os.strerror(40), path)
        target = os.readlink(step)
        at = "/" if target.startswith("/") else at
        rest += target.split("/")[::-1]
