"""Run fuzzers: what `launch/fuzz` calls, and `test_fuzz.py`.

A case is made of a seed and its number alone. When one fails it is made smaller and written to a file, which `--replay`
runs again.
"""

from __future__ import annotations

import argparse
import importlib
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzz import shrink
from fuzz.target import Case, Finding, Target

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / ".mooncake" / "fuzz"
TARGETS = {
    "data": ("data_port", "DataPort"),
    "rpc": ("rpc_port", "RpcPort"),
    "stranger": ("stranger", "Stranger"),
    "handshake": ("handshake", "Handshake"),
    "handoff": ("handoff", "Handoff"),
    "reader": ("handoff", "Reader"),
    "records": ("records", "Records"),
    "boards": ("boards", "Boards"),
    "engines": ("machines", "Engines"),
    "stores": ("machines", "Stores"),
}
CHECK_INTERVAL_S = 1.0


def make(name: str) -> Target:
    module, kind = TARGETS[name]
    target: Target = getattr(importlib.import_module(f"fuzz.{module}"), kind)()
    return target


@dataclass
class Result:
    """What a run of one target came to. `file` has the smallest failing input."""

    name: str
    unit: str
    frames: int
    seconds: float
    found: str = ""
    file: Path | None = None

    def line(self) -> str:
        rate = self.frames / max(self.seconds, 1e-9)
        text = f"{self.name:<10}{self.frames:>13,} {self.unit:<8}{self.seconds:>8.1f} s{rate:>12,.0f} a second"
        return f"{text}   FAILED" if self.found else text


def fails(target: Target, case: Case) -> bool:
    """Whether the case alone makes a target fail. It is started again after one that did."""
    try:
        if target.node is None:
            target.start()
        target.run([list(messages) for messages in case])
        target.check()
    except Finding:
        target.stop()
        return True
    return False


def fuzz(target: Target, seconds: float, seed: str, shrink_seconds: float = 60.0, progress: bool = False) -> Result:
    """Run cases for `seconds`, up to the first that fails."""
    recent: list[Case] = []
    number, found, began = 0, "", time.monotonic()
    try:
        target.start()
        target.check()
        began = shown = checked = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            case = target.generate(Random(f"{target.name}:{seed}:{number}"))
            recent.append(case)
            target.run(case)
            number += 1
            if now > checked + CHECK_INTERVAL_S:
                target.check()
                checked = time.monotonic()
                recent.clear()
            if progress and now > shown + 1.0:
                shown = now
                print(f"\r{Result(target.name, target.unit, target.frames, now - began).line()}", end="", flush=True)
        target.check()
    except Finding as finding:
        found = str(finding)
    result = Result(target.name, target.unit, target.frames, time.monotonic() - began, found)
    if progress:
        print("\r" + " " * 100, end="\r")
    if found:
        result.file = keep(target, recent, seed, number, found, shrink_seconds)
    target.stop()
    return result


def keep(target: Target, recent: list[Case], seed: str, number: int, found: str, seconds: float) -> Path:
    """Write the smallest input that fails: of the last case, else of all since the last check."""
    last = recent[-1] if recent else []
    whole = [messages for case in recent for messages in case]
    target.stop()
    case = next((c for c in (last, whole) if fails(target, c)), None) if target.shrinks else last
    if not target.shrinks:
        pass
    elif case is None:
        case, found = whole, f"(not seen again alone) {found}"
    else:
        case = shrink.shrink([list(messages) for messages in case], lambda c: fails(target, c), seconds)
    path = FOUND / f"{target.name}-{seed}-{number}.json"
    shrink.save(path, target.name, seed, found, case)
    return path


def replay(path: Path) -> int:
    name, case = shrink.load(path)
    target = make(name)
    try:
        target.start()
        target.check()
        target.run(case)
        target.check()
    except Finding as finding:
        print(f"{name}: {finding}")
        return 1
    finally:
        target.stop()
    print(f"{name}: nothing found with {path}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch/fuzz")
    parser.add_argument("--minutes", type=float, default=1.0, help="for all targets together [1]")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this; may be repeated")
    parser.add_argument("--seed", default="", help="the seed of an earlier run [random]")
    parser.add_argument("--replay", type=Path, help="run the input of a file once more")
    options = parser.parse_args(arguments)
    if options.replay:
        return replay(options.replay)
    seed = options.seed or secrets.token_hex(4)
    names = options.target or list(TARGETS)
    print(f"seed {seed}; {', '.join(names)}", flush=True)
    results = []
    for name in names:
        share = options.minutes * 60 / len(names)
        result = fuzz(make(name), share, seed, progress=os.isatty(1))
        print(result.line(), flush=True)
        if result.found:
            print(f"  {result.found}\n  smallest input: {result.file}\n  again: launch/fuzz --replay {result.file}")
        results.append(result)
    failed = [result.name for result in results if result.found]
    print(
        f"{sum(r.frames for r in results):,} inputs, seed {seed}: {'FAILED: ' + ', '.join(failed) if failed else 'OK'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
