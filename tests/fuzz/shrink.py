"""A failing input made small: fewer connections, fewer messages, fewer bytes, as long as it still fails."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fuzz.target import Case

T = TypeVar("T")
Fails = Callable[[Case], bool]


def fewer(items: list[T], fails: Callable[[list[T]], bool], deadline: float) -> list[T]:
    """The list without what is not needed for it to fail: halves first, then less and less at a time."""
    step = len(items)
    while step >= 1 and time.monotonic() < deadline:
        at = 0
        while at < len(items) and time.monotonic() < deadline:
            rest = items[:at] + items[at + step :]
            if len(rest) < len(items) and fails(rest):
                items = rest
            else:
                at += step
        step //= 2
    return items


def shrink(case: Case, fails: Fails, seconds: float) -> Case:
    """The smallest case found within `seconds` that still fails."""
    deadline = time.monotonic() + seconds
    case = fewer(case, fails, deadline)
    for number in range(len(case)):
        case[number] = fewer(case[number], lambda m, n=number: fails([*case[:n], m, *case[n + 1 :]]), deadline)
        for place in range(len(case[number])):

            def with_message(data: list[int], n: int = number, p: int = place) -> Case:
                messages = case[n]
                return [*case[:n], [*messages[:p], bytes(data), *messages[p + 1 :]], *case[n + 1 :]]

            message = list(case[number][place])
            message = fewer(message, lambda data, build=with_message: fails(build(data)), deadline)
            case[number][place] = bytes(message)
    return case


def save(path: Path, target: str, seed: str, text: str, case: Case) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    messages = [[base64.b64encode(message).decode() for message in messages] for messages in case]
    path.write_text(json.dumps({"target": target, "seed": seed, "found": text, "case": messages}, indent=1) + "\n")


def load(path: Path) -> tuple[str, Case]:
    """The target's name and the case of a file that `save` wrote."""
    value = json.loads(path.read_text())
    return value["target"], [[base64.b64decode(message) for message in messages] for messages in value["case"]]
