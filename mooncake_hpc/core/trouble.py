"""Threads that live as long as their owner: what goes wrong in one is said once, and tried again ever more seldom."""

from __future__ import annotations

import logging

FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 5.0


class Trouble:
    """What goes wrong in one thread's loop. `what` begins the messages."""

    def __init__(self, log: logging.Logger, what: str, last_pause_s: float = LAST_PAUSE_S) -> None:
        self._log, self._what, self._last_pause_s = log, what, last_pause_s
        self._told, self._pause_s = "", FIRST_PAUSE_S

    def pause_s(self, error: Exception) -> float:
        """Log the error, unless it is the last one again, and return the seconds to wait before the next try."""
        if (text := repr(error)) != self._told:
            self._told = text
            unexpected = None if isinstance(error, OSError) else error  # bugs come with their traceback
            self._log.warning("%s: %s", self._what, error if unexpected is None else text, exc_info=unexpected)
        self._pause_s, now = min(2 * self._pause_s, self._last_pause_s), self._pause_s
        return now

    def over(self) -> None:
        """It went well."""
        self._told, self._pause_s = "", FIRST_PAUSE_S
