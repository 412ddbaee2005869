"""SIGTERM ends a program as Ctrl-C does: by an exception, so that everything is closed on the way out."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

GRACE = 1.0  # seconds in which further signals are taken for echoes: launchers and terminals send several


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM Terminated, once; a signal after GRACE seconds kills."""
    first = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first:
            if time.monotonic() - first > GRACE:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        first = time.monotonic()
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
