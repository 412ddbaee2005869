"""SIGTERM ends a program as Ctrl-C does: by an exception, so that everything is closed on the way out."""

from __future__ import annotations

import atexit
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
NUMBERS = signal.SIGINT, signal.SIGTERM
AGAIN = 0.02  # seconds after which a signal is sent again whose exception was lost


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


class _Stopper:
    """What signals do while a program runs; `first` is when one came (`time.monotonic`), 0 before."""

    def __init__(self) -> None:
        self.first = 0.0
        self._hook = sys.unraisablehook

    def stop(self, number: int, frame: FrameType | None) -> None:
        if self.first:
            if time.monotonic() - self.first > GRACE:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.first = time.monotonic()
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def send_again(self, swallowed: UnraisableHookArgs) -> None:
        """Raised in a destructor or in a callback from C, it went no further: send the signal again, soon."""
        if not isinstance(swallowed.exc_value, KeyboardInterrupt):
            self._hook(swallowed)
            return
        self.first = 0.0
        number = signal.SIGTERM if isinstance(swallowed.exc_value, Terminated) else signal.SIGINT
        threading.Timer(AGAIN, os.kill, (os.getpid(), number)).start()

    def ignore_echoes(self) -> None:
        """An interpreter that ends takes Python's handlers away, and would die of the next echo."""
        for number in NUMBERS if self.first else ():
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM Terminated, once; a signal after GRACE seconds kills.

    Afterwards signals are what they were; but where one has come the program is about to end, and its echoes are not
    to cut that short.
    """
    stopper, hook = _Stopper(), sys.unraisablehook
    atexit.register(stopper.ignore_echoes)
    sys.unraisablehook = stopper.send_again
    before = {number: signal.signal(number, stopper.stop) for number in NUMBERS}
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if not stopper.first:
            for number, handler in before.items():
                signal.signal(number, handler)
