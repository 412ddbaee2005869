"""Host files, in the forms that MPI libraries use."""

from __future__ import annotations

import re

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.jobs.launchers.base import Host

LINE = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)(:(?P<colon>\d{1,6})|(?P<words>(\s+[\w-]+=\S+)*))")


def parse(text: str, where: str = "the host file") -> tuple[Host, ...]:
    """`h0`, `h0:4` (MPICH, Intel) and `h0 slots=4` (Open MPI), `#` comments; a repeated host adds up.

    ConfigError names the line that is none of these.
    """
    slots: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not (words := line.partition("#")[0].strip()):
            continue
        match = LINE.fullmatch(words)
        count = int(_slots(match)) if match else 0
        if match is None or count < 1:
            raise ConfigError(f"{where}, line {number}: {line.strip()!r} is none of h0, h0:4 and h0 slots=4")
        slots[match["name"]] = slots.get(match["name"], 0) + count
    if not slots:
        raise ConfigError(f"{where} names no host")
    return tuple(Host(name, count) for name, count in slots.items())


def _slots(match: re.Match[str]) -> str:
    if match["colon"]:
        return match["colon"]
    words = dict(word.split("=", 1) for word in (match["words"] or "").split())
    slots = words.get("slots", "1")
    return slots if slots.isdecimal() and len(slots) <= 6 else "0"
