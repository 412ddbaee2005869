"""How busy the machine is with what is not ours."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

TICK = os.sysconf("SC_CLK_TCK")
LOOKS, PAUSE, TURNS = 21, 0.1, 2000  # looks at a cache line at first, seconds between them, its round trips a look
NEAR = 1.6  # times as long, or as short, as usual is still as usual

Sample = TypeVar("Sample")


def busy_seconds(interrupts: bool = True) -> float:
    """CPU seconds that the whole machine has worked since its start; without `interrupts` only those of processes."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, soft, *_ = (int(word) for word in file.readline().split()[1:])
    return (user + nice + system + (irq + soft if interrupts else 0)) / TICK


class Watch:
    """How many cores were busy with anything but this run, between `__init__` and `others`."""

    def __init__(self, own: Callable[[], float], interrupts: bool = True) -> None:
        self._own, self._interrupts = own, interrupts
        self._begin = time.monotonic(), busy_seconds(interrupts), own()

    def others(self) -> float:
        begin, busy, own = self._begin
        work = busy_seconds(self._interrupts) - busy - (self._own() - own)
        return max(0.0, work / (time.monotonic() - begin))


class Calm:
    """Waits for the machine to be ours alone and as it is most of the time.

    Where cores are a virtual machine's the host moves them: to one core's two threads, or to where they share no cache
    any more, and then whatever passes from one core to another, which is what all contenders do, takes two or three
    times as long, for seconds. It shows in how long a cache line takes there and back.
    """

    def __init__(self, limit: float, patience: float, tell: Callable[[str], None]) -> None:
        """`limit`: cores that others may use; `patience`: seconds that a wait takes at most, none at 0."""
        self._limit, self._patience, self._tell = limit, patience, tell
        self.again = 0  # samples that were taken again
        self._usual = 0.0  # nanoseconds of a cache line
        if patience:
            self._usual = median(self._look_later() for _ in range(LOOKS))

    def wait(self) -> None:
        """Until others use few cores for a second and ours are where they usually are."""
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            self._tell(f"waiting for a calm moment, {deadline - time.monotonic():.0f} s at most")
            watch = Watch(time.process_time)
            time.sleep(1.0)
            if watch.others() <= self._limit and not self._moved():
                return

    def sample(self, take: Callable[[], Sample]) -> Sample:
        """What `take` returns; taken again, for as long as a wait may take, where the cores were moved meanwhile."""
        deadline = time.monotonic() + self._patience
        while True:
            while self._moved() and time.monotonic() < deadline:
                time.sleep(PAUSE)
            taken = take()
            if not self._moved() or time.monotonic() >= deadline:
                return taken
            self.again += 1

    def _moved(self) -> bool:
        return bool(self._usual) and not self._usual / NEAR < self._look() < self._usual * NEAR

    def _look_later(self) -> float:
        time.sleep(PAUSE)
        return self._look()

    def _look(self) -> float:
        from raw_latency import round_trip

        return round_trip(TURNS)
