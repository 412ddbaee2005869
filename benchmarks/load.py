"""How busy the machine is with what is not ours."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

TICK = os.sysconf("SC_CLK_TCK")


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


def calm(limit: float, patience: float, tell: Callable[[str], None]) -> None:
    """Wait until others use at most `limit` cores for a second, for at most `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        tell(f"waiting for a calm moment, {deadline - time.monotonic():.0f} s at most")
        watch = Watch(time.process_time)
        time.sleep(1.0)
        if watch.others() <= limit:
            return
