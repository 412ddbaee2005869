"""Which process an object belongs to, and what a forked child must not keep of its parent's.

A child of fork(2) inherits every object and descriptor of its parent, but none of its threads. Were it to use an
inherited engine, both would read from one socket; were it only to live on, it would hold the parent's connections open
after the parent's death, so that peers wait for it. Therefore:

- Public objects keep the `Process` that made them. Each public call compares it with `here`, which a child replaces,
  and raises ForkError. `close` and its kind do nothing in a child.
- The child closes its copies of the descriptors that were given to `own` and `own_listener`, by close(2) alone: a
  shutdown(2) would end the parent's connection.

The hook takes no lock, as another thread of the parent may have held it at the fork, and locks of modules are made anew
in the child (`lock`). Where that does not do, since what a lock guards would be half done in the child, the fork waits
for it (`finish_before_forks`). Memory that both may write (memory files, the workers' ring) stays mapped in the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading
from typing import Any, NoReturn, Protocol, TypeVar
from weakref import WeakSet

from mooncake_hpc.core.errors import ForkError

LONGEST_WAIT_S = 60.0  # of a fork, for a lock


class Process:
    """A process. There is one of this class in each; `here` is it."""

    def __init__(self) -> None:
        self.pid = os.getpid()


class Owned(Protocol):
    """What belongs to the process that made it."""

    _process: Process


class Closable(Protocol):
    """A descriptor's object. Its `close` is close(2) and nothing else: a socket, or an unbuffered file."""

    def close(self) -> object: ...


D = TypeVar("D", bound=Closable)

here = Process()
_descriptors: WeakSet[Closable] = WeakSet()
_listeners: WeakSet[socket.socket] = WeakSet()
_locks: list[threading.Lock] = []
_awaited: list[Any] = []
_held = threading.local()  # `.locks`, by a thread that forks
_libc = ctypes.CDLL(None)


def check(owned: Owned) -> None:
    """Raise ForkError where this process has only inherited the object. The data path writes the comparison out."""
    if owned._process is not here:
        refuse(owned)


def refuse(owned: Owned) -> NoReturn:
    """Raise the ForkError of an inherited object."""
    kind, maker = type(owned).__name__, owned._process.pid
    name = getattr(owned, "name", None) or getattr(owned, "spec", None)
    what = f"{kind} {name!r}" if isinstance(name, str) else f"this {kind}"
    raise ForkError(
        f"{what} belongs to process {maker}, and this is process {here.pid}, a forked child of it: open a new {kind} "
        "here, in the child"
    )


def own(descriptor: D) -> D:
    """Have children close their copies of this descriptor. Returns it."""
    _descriptors.add(descriptor)
    return descriptor


def own_listener(listener: socket.socket) -> socket.socket:
    """As `own`, for a listening socket and for all connections that were accepted from it, by whomever."""
    _listeners.add(listener)
    return own(listener)


def lock() -> threading.Lock:
    """A lock for a module's globals: in a child it is free."""
    made = threading.Lock()
    _locks.append(made)
    return made


def finish_before_forks(lock: Any) -> None:
    """Have forks wait until no thread holds this lock, LONGEST_WAIT_S at most. Locks are taken in the order given."""
    _awaited.append(lock)


def _before_fork() -> None:
    _held.locks = [lock for lock in _awaited if lock.acquire(timeout=LONGEST_WAIT_S)]


def _after_fork() -> None:
    while _held.locks:
        _held.locks.pop().release()


def _begin_child() -> None:
    """In a forked child, before anything else of ours."""
    global here
    here = Process()
    _after_fork()
    for each in _locks:
        each._at_fork_reinit()  # type: ignore[attr-defined]  # as the standard library does with its own
    descriptors, names = list(_descriptors), [_local_name(listener.fileno()) for listener in _listeners]
    _descriptors.clear()
    _listeners.clear()
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            descriptor.close()
    if names:
        _close_accepted(names)


def _close_accepted(listening: list[bytes]) -> None:
    """Close the sockets whose local address is one of these: kernels accept connections that no object stands for."""
    with contextlib.suppress(OSError):
        for fd in map(int, os.listdir("/proc/self/fd")):
            local = _local_name(fd)
            if local and any(_is_of(local, name) for name in listening):
                os.close(fd)


def _local_name(fd: int) -> bytes:
    """The local address of a socket as the system writes it, b"" where `fd` is none. No socket object is made for it:
    that could set the descriptor non-blocking, for the parent too."""
    size = ctypes.c_uint32(128)  # struct sockaddr_storage
    name = ctypes.create_string_buffer(size.value)
    if fd < 0 or _libc.getsockname(fd, name, ctypes.byref(size)):
        return b""
    return name.raw[: size.value]


def _is_of(local: bytes, listening: bytes) -> bool:
    """Whether a socket with this local address was accepted from the listener with that one, or is it."""
    family = int.from_bytes(listening[:2], sys.byteorder)
    if family == socket.AF_INET:
        start, end = 4, 8
    elif family == socket.AF_INET6:
        start, end = 8, 24
    else:
        return bool(listening) and local == listening
    address = listening[start:end]
    return local[:4] == listening[:4] and address in (local[start:end], bytes(end - start))  # zeros: any address


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_begin_child)
