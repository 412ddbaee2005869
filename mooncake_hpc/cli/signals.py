"""SIGTERM ends a program as Ctrl-C does: by an exception, so that everything is closed on the way out."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

GRACE = 1.0  # seconds in which further signals are taken for echoes: launchers and terminals send several
AGAIN = 0.02  # seconds after which a signal is sent again whose exception was lost


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

    def again(swallowed: UnraisableHookArgs) -> None:
        """Raised in a destructor or in a callback from C, it went no further: send the signal again, soon."""
        nonlocal first
        if not isinstance(swallowed.exc_value, KeyboardInterrupt):
            hook(swallowed)
            return
        first = 0.0
        number = signal.SIGTERM if isinstance(swallowed.exc_value, Terminated) else signal.SIGINT
        threading.Timer(AGAIN, os.kill, (os.getpid(), number)).start()

    hook, sys.unraisablehook = sys.unraisablehook, again
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
