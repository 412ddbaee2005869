"""What the P2P commands print: a pull's line, a progress bar, the table of a fan-out over ranks."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mooncake_hpc.p2p.catalog import ObjectInfo
from mooncake_hpc.p2p.progress import Progress

JSON_VERSION = 1
BAR = 28  # columns


class Bar:
    """A progress callback that draws on a terminal: shards, GB/s, sources. Draws nothing elsewhere."""

    def __init__(self, enabled: bool | None = None) -> None:
        self._enabled = sys.stderr.isatty() if enabled is None else enabled

    def __call__(self, progress: Progress) -> None:
        if self._enabled:
            print("\r" + bar_line(progress), end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._enabled:
            print(file=sys.stderr)


def bar_line(progress: Progress) -> str:
    share = progress.done / progress.size if progress.size else 1.0
    drawn = "█" * int(share * BAR)
    rate = progress.throughput / 1e9
    return (
        f"{drawn:·<{BAR}} {100 * share:3.0f} %  {progress.shards_done}/{progress.shards} shards  {rate:.2f} GB/s  "
        f"{len(progress.sources)} sources "
    )


def pull_lines(name: str, progress: Progress) -> list[str]:
    """What an inferencer says of its pull."""
    fetched = progress.done - progress.resumed
    lines = [
        f"{name}: {progress.done} bytes in {progress.shards_done} shards, {fetched} of them in "
        f"{progress.seconds:.3f} s: {progress.throughput / 1e9:.3f} GB/s"
    ]
    for source, nbytes in progress.sources.most_common():
        by = progress.transports.get(source, "")
        lines.append(f"  from {source}: {nbytes} bytes, {100 * nbytes / max(1, fetched):.1f} %, by {by}")
    for source, count in progress.wrong.items():
        lines.append(f"  WRONG BYTES from {source}: {count} shards, fetched elsewhere")
    for source, count in progress.failures.items():
        lines.append(f"  {source} failed {count} times")
    return lines


def pull_json(name: str, host: str, config: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """One inferencer's pull, in bytes and seconds; `name` is its segment's."""
    return {
        "version": JSON_VERSION,
        "time": time.time(),
        "name": name,
        "host": host,
        "size": progress.size,
        "shards": progress.shards,
        "seconds": progress.seconds,
        "throughput": progress.throughput,
        "sources": dict(progress.sources),
        "transports": dict(progress.transports),
        "wrong": progress.wrong.total(),
        "failures": progress.failures.total(),
        "config": config,
    }


def list_lines(objects: Sequence[ObjectInfo]) -> list[str]:
    """A table of objects, holders and their progress."""
    if not objects:
        return ["no objects"]
    lines = [f"{'object':<32} {'version':<16} {'bytes':>14} {'shards':>7} {'replicas':>8}  holders"]
    for one in objects:
        name, holders = _shown(one.name), len(one.holders)
        lines.append(f"{name:<32} {one.version:<16} {one.size:>14} {one.shards:>7} {one.replicas:>8}  {holders}")
        for holder, have in sorted(one.holders.items()):
            share = 100 * have / one.shards if one.shards else 100.0
            lines.append(f"    {_shown(holder):<40} {have}/{one.shards} shards, {share:.0f} %")
    return lines


def _shown(name: str) -> str:
    """A name of others', without what a terminal would take for a command."""
    return name if name.isprintable() else repr(name)[1:-1]


def bound(size: int, rate: float, readers: int, shards: int) -> float:
    """Seconds that no fan-out over equal links can beat: the first holder's link carries each shard once, and the last
    shard doubles its holders in each further step. `rate` is what one reader alone gets, bytes a second."""
    return size / rate * (1 + math.floor(math.log2(readers)) / max(1, shards))


@dataclass(slots=True)
class FanOut:
    """The result of a fan-out over ranks. `seconds` and `served` (bytes) are by rank, the first holder's is rank 0."""

    size: int
    shards: int
    readers: int
    alone: float | None  # seconds of one reader alone
    seconds: dict[int, float] = field(default_factory=dict)
    served: dict[int, int] = field(default_factory=dict)
    failures: int = 0
    wrong: int = 0

    @property
    def slowest(self) -> float:
        return max(self.seconds.values())

    @property
    def throughput(self) -> float:
        """Bytes a second that all readers together received."""
        return self.readers * self.size / self.slowest if self.slowest else 0.0

    @property
    def seeded(self) -> float:
        """Objects that the first holder sent."""
        return self.served.get(0, 0) / self.size if self.size else 0.0

    @property
    def efficiency(self) -> float | None:
        """The bound's time over the measured one."""
        if self.alone is None or not self.slowest or not self.size:
            return None
        return bound(self.size, self.size / self.alone, self.readers, self.shards) / self.slowest

    def lines(self) -> list[str]:
        lines = [f"{'rank':>4} {'seconds':>9} {'GB/s':>8} {'served, objects':>16}"]
        for rank, seconds in sorted(self.seconds.items()):
            rate = self.size / seconds / 1e9 if seconds else 0.0
            served = self.served.get(rank, 0) / max(1, self.size)
            lines.append(f"{rank:>4} {seconds:>9.3f} {rate:>8.3f} {served:>16.2f}")
        lines.append(
            f"slowest {self.slowest:.3f} s, aggregate {self.throughput / 1e9:.3f} GB/s, {self.seeded:.2f} objects "
            f"sent by the seed, {self.failures} failures, {self.wrong} wrong shards"
        )
        if self.efficiency is not None:
            lines.append(f"one reader alone {self.alone:.3f} s; fan-out efficiency {self.efficiency:.3f}")
        return lines

    def as_json(self) -> dict[str, Any]:
        derived = {
            "slowest": self.slowest,
            "throughput": self.throughput,
            "seeded": self.seeded,
            "efficiency": self.efficiency,
        }
        return {"version": JSON_VERSION, "time": time.time(), **asdict(self), **derived}


def write_json(path: str, value: dict[str, Any]) -> None:
    """Append a line of JSON to the file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
