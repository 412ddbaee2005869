"""One thread ends what others wait for: connections that they dial or talk over, pauses, calls without a deadline."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Interrupted(OSError):
    """The wait was ended from outside."""

    def __init__(self) -> None:
        super().__init__(errno.ECANCELED, "interrupted: its owner closes")


class Interrupt:
    """Once it is set, every wait under it ends, and none begins. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = threading.Event()
        self._enders: dict[object, Callable[[], object]] = {}

    @property
    def is_set(self) -> bool:
        return self._set.is_set()

    def set(self) -> None:
        """End all waits, now and from now on. Idempotent."""
        self._set.set()
        with self._lock:
            for end in self._enders.values():
                end()

    @contextlib.contextmanager
    def cuts(self, connection: socket.socket) -> Iterator[None]:
        """Have a socket shut down when the interrupt is set meanwhile. Raises Interrupted when it is set already."""

        def cut() -> None:
            with contextlib.suppress(OSError):  # it is over already
                connection.shutdown(socket.SHUT_RDWR)

        with self._ended_by(cut):
            yield

    def call(self, function: Callable[[], T], timeout: float | None = None) -> T:
        """What `function` returns or raises. It runs in a thread of its own, which goes on alone after a time-out.

        Raises Interrupted, TimeoutError.
        """
        done = threading.Event()
        answer: list[T] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                answer.append(function())
            except BaseException as error:
                failure.append(error)
            done.set()

        with self._ended_by(done.set):
            threading.Thread(target=run, name="mooncake-call", daemon=True).start()
            finished = done.wait(timeout)
        if answer:
            return answer[0]
        if failure:
            raise failure[0]
        raise Interrupted if finished else TimeoutError(errno.ETIMEDOUT, f"no answer within {timeout:g} s")

    def pause(self, seconds: float) -> None:
        """Sleep. Raises Interrupted."""
        if self._set.wait(seconds):
            raise Interrupted

    @contextlib.contextmanager
    def _ended_by(self, end: Callable[[], object]) -> Iterator[None]:
        key = object()
        with self._lock:
            if self._set.is_set():
                raise Interrupted
            self._enders[key] = end
        try:
            yield
        finally:
            with self._lock:
                del self._enders[key]
