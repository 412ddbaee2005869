"""Values that programs get wrong: integers at borders, lengths that lie, texts, JSON and bytes mutated by field.

All of them come from a `random.Random`, so that a seed gives the same input again.
"""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

BORDERS = sorted(
    {
        (1 << bits) + delta
        for bits in (0, 7, 8, 15, 16, 20, 24, 31, 32, 40, 47, 48, 53, 62, 63, 64)
        for delta in (-2, -1, 0, 1, 2)
        if 0 <= (1 << bits) + delta < 1 << 64
    }
)
TEXTS = (
    "", " ", "\0", "a\0b", "\n", "/", "//", "..", "../../etc", "%", "%00", "%s%n", "current", "all", "none",
    "\ud800", "\udfff\ud800", "\U0010ffff", "\u202e", "é" * 100, "a" * 63, "a" * 64, "a" * 255, "a" * 4096,
    "a." * 200, ".", "a..b", "-", "host:", ":1", "host:99999", "host:-1", "[::1]:1", "[", "]:", "127.0.0.1:0",
    "xn--", "\\", "'\"", "0", "-1", "1e999", "true", "null",
)  # fmt: skip
NUMBERS = (
    "0", "-0", "-1", "1", "1.5", "-1.5", "1e2", "1e999", "-1e999", "1e-999", "NaN", "Infinity", "-Infinity",
    "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616",
    "-9223372036854775808", "-9223372036854775809", "1" + "0" * 30, "1" + "0" * 400, "9" * 5000, "00", "+1", "0x10",
)  # fmt: skip


class Raw:
    """Text that `dump` copies as it is: what is not, or hardly, JSON."""

    def __init__(self, text: str) -> None:
        self.text = text


def border(chance: Random) -> int:
    """An unsigned integer of 64 bits near a power of two, or any."""
    return chance.choice(BORDERS) if chance.random() < 0.8 else chance.getrandbits(chance.choice((8, 16, 32, 48, 64)))


def nasty(chance: Random) -> Any:
    """A JSON value that a field is seldom checked for."""
    kind = chance.randrange(9)
    if kind < 3:
        return Raw(chance.choice(NUMBERS))
    if kind == 3:
        return border(chance) * chance.choice((1, 1, -1))
    if kind < 6:
        return chance.choice(TEXTS)
    if kind == 6:
        return Raw(deep(chance))
    return copy.deepcopy(chance.choice((None, True, False, [], {}, [[]], {"": ""}, [None], [0, 0], {"a": [1]}, [{}])))


def deep(chance: Random) -> str:
    """Nested brackets, closed or not."""
    depth = chance.choice((10, 100, 1000, 20_000, 100_000))
    opening, closing = chance.choice((("[", "]"), ('{"a":', "}")))
    return opening * depth + (chance.choice(("1", "", "null")) + closing * depth) * chance.randrange(2)


def dump(value: Any) -> str:
    """JSON, with `Raw` texts in it; surrogates stay escaped."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(dump(item) for item in value) + "]"
    return json.dumps(value)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        here = waiting.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        for key in keys:
            found.append((here, key))
            waiting.append(here[key])
    return found


def mutate_json(chance: Random, value: Any) -> str:
    """The text of a JSON value with some fields changed, and now and then some bytes."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        found = places(value)
        if not found or chance.random() < 0.03:
            value = nasty(chance)
            continue
        here, key = chance.choice(found)
        kind = chance.randrange(8)
        if kind < 4:
            here[key] = nasty(chance)
        elif kind == 4:
            del here[key]
        elif kind == 5 and isinstance(here, dict):
            here[chance.choice(TEXTS)] = here.pop(key) if chance.random() < 0.5 else nasty(chance)
        elif isinstance(here[key], int) and not isinstance(here[key], bool):
            here[key] = max(0, here[key] + chance.choice((-1, 1, 1 << 32, 1 << 63, -(1 << 20), here[key])))
        elif isinstance(here[key], list):
            times = chance.choice((2, 3, 50)) if len(here[key]) < 100 else 2
            here[key] = here[key] * times if chance.random() < 0.7 else [here[key]]
        elif isinstance(here[key], str) and len(here[key]) < 100_000:
            here[key] = here[key] + chance.choice(TEXTS) if chance.random() < 0.7 else here[key] * 50
    text = dump(value)
    if chance.random() < 0.1:
        text = mutate_bytes(chance, text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    return text


def mutate_bytes(chance: Random, data: bytes) -> bytes:
    """Some bytes changed, taken out, put in, or said twice."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(6)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            del changed[at : at + chance.choice((1, 2, 8, 64))]
        elif kind == 2:
            changed[at:at] = chance.randbytes(chance.choice((1, 2, 8, 64)))
        elif kind == 3:
            changed[at:at] = changed[at : at + chance.choice((8, 24, 64))]
        elif at < len(changed):
            changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return bytes(changed)


def cut(chance: Random, data: bytes) -> list[bytes]:
    """The same bytes in one piece, or in several, some of them of a single byte."""
    if len(data) < 2 or chance.random() < 0.5:
        return [data]
    count = chance.choice((1, 1, 2, 5, 20))
    cuts = sorted({chance.randrange(1, len(data)) for _ in range(count)})
    if chance.random() < 0.2:
        cuts = sorted({*cuts, *range(1, min(len(data), 30))})
    ends = [*cuts, len(data)]
    return [data[begin:end] for begin, end in zip([0, *cuts], ends, strict=True)]
