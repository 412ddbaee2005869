"""Ranks that fail at about the same time: one of them tells, once for each cause, and the others are quiet.

A rank that fails tells the others what it has met with, and listens. Whoever was at fault, or the launcher, may end it
meanwhile; else the first of them by rank tells, and ends the job. A rank whose words reach nobody tells by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

SENDING = 0.05  # seconds for MPI to pass on what was announced
HOLD = 1.0  # seconds that a rank listens before it tells: for a launcher to end it, where another process is dead
QUIET = 5.0  # seconds after which a rank tells that should have been ended by the one that does
POLL = 0.02  # seconds between two looks for words of others
TOLD = 2  # tag of these messages
EVERYBODY = 64  # ranks that all failing ones write to; those write to all: of more ranks not each needs to


@dataclass(frozen=True, slots=True)
class Failure:
    """What a rank met with. `suspects` are ranks that do not answer it; `cause` is what others may have in common."""

    rank: int
    line: str
    cause: str
    suspects: frozenset[int] = frozenset()
    telling: bool = False  # it does, whoever else may have failed


def causes(failures: Iterable[Failure]) -> list[Failure]:
    """One for each cause, by rank, at least one. Ranks that failed themselves are no suspects, and explain those who
    suspect no others."""
    ordered = sorted(failures, key=lambda failure: failure.rank)
    failed = {failure.rank for failure in ordered}
    told: dict[object, Failure] = {}
    for failure in ordered:
        suspects = failure.suspects - failed
        if suspects or not failure.suspects:
            told.setdefault(suspects or failure.cause, replace(failure, suspects=suspects))
    return list(told.values()) or ordered[:1]


class Verdict:
    """The words of failing ranks over `comm`, which may be broken: then a rank is by itself."""

    def __init__(self, comm: Any, mine: Failure) -> None:
        self._comm, self._mine = comm, mine
        self._heard = {mine.rank: mine}
        self._sent: list[Any] = []  # MPI still uses their memory

    def announce(self) -> None:
        """Let the others know at once, before this rank's end makes it look as if it were at fault. To be kept."""
        self._write(self._mine)
        deadline = time.monotonic() + SENDING
        while self._sent and time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                self._comm.iprobe(tag=TOLD)  # takes nothing out, but has MPI work
            time.sleep(POLL)

    def to_tell(self) -> list[Failure]:
        """What this rank is to tell, its own failure or also others'.

        Waits HOLD seconds, and QUIET on top where another rank should have told, and ended this one.
        """
        self._write(self._mine)
        if not self._sent:  # there is nobody else
            return [self._mine]
        self._listen(HOLD)
        if min(self._heard) < self._mine.rank or any(failure.telling for failure in self._heard.values()):
            self._listen(QUIET)
            return [self._mine]
        self._write(replace(self._mine, telling=True))
        return causes(self._heard.values())

    def _write(self, failure: Failure) -> None:
        size = self._comm.Get_size()
        for rank in range(size if failure.rank < EVERYBODY else min(size, EVERYBODY)):
            if rank != failure.rank:
                with contextlib.suppress(Exception):  # whatever a broken MPI raises
                    self._sent.append(self._comm.isend(failure, dest=rank, tag=TOLD))

    def _listen(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                while (message := self._comm.improbe(tag=TOLD)) is not None:
                    failure = message.recv()
                    self._heard[failure.rank] = failure
            time.sleep(POLL)
