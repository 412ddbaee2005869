"""The cases of the comparison: loads, who takes part, and what is to be reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contenders import Contender, Load, Original, Ours, Raw, RawLatency, Sample, Stage

Round = dict[str, Sample]  # one sample of each contender, by name
KIB, MIB = 1 << 10, 1 << 20
SLOWEST = 0.97  # of another build's speed


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure of each round, whose median is to be at least, or at most, `limit`."""

    what: str
    figure: Callable[[Round], float]
    limit: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def text(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Case:
    """Contenders by name, measured in turn under one load."""

    name: str
    load: Load
    contenders: dict[str, Callable[[Stage], Contender]]
    goals: tuple[Goal, ...]


def faster_than(*others: str, limit: float, what: str) -> Goal:
    """Our throughput over the best of the others' in the same round."""
    return Goal(what, lambda seen: seen["ours"].bytes_per_second / max(seen[o].bytes_per_second for o in others), limit)


def quicker_than_original(limit: float) -> Goal:
    """With one request at a time, a request's latency is the time between two."""
    return Goal(
        "latency, ours / original",
        lambda seen: seen["original"].requests_per_second / seen["ours"].requests_per_second,
        limit,
        at_least=False,
    )


OURS_AND_ORIGINAL: dict[str, Callable[[Stage], Contender]] = {"ours": Ours, "original": Original}
RAW: dict[str, Callable[[Stage], Contender]] = {
    "raw, a call a block": lambda stage: Raw(stage, "stream"),
    "raw, 1 MiB a call": lambda stage: Raw(stage, "stream", MIB),
}
CPU = Goal("CPU s/GB, both sides", lambda seen: seen["ours"].cpu_seconds_per_gb, 0.5, at_least=False)


def against(case: Case, build: Path) -> Case:
    """The same load for this build and for another one of ours, and nobody else."""
    ours = case.contenders["ours"]
    contenders = {"ours": ours, "before": lambda stage: ours(stage.of_build(build))}
    goal = Goal(
        "ours / before",
        lambda seen: seen["ours"].requests_per_second / seen["before"].requests_per_second,
        SLOWEST,
    )
    return Case(case.name, case.load, contenders, (goal,))


def _size(count: int) -> str:
    return f"{count // MIB} MiB" if count >= MIB else f"{count // KIB} KiB"


def _tcp(load: Load, ratio: float, raw: float = 0.0, *more: Goal) -> Case:
    """`raw`: what part of the better of the raw loops is to be reached."""
    goals = [faster_than("original", limit=ratio, what="ours / original")]
    if raw:
        goals.append(faster_than(*RAW, limit=raw, what="ours / better raw"))
    name = f"tcp {_size(load.block)} × {load.batch}{f' × {load.threads}' if load.threads > 1 else ''} {load.operation}"
    return Case(name, load, {**OURS_AND_ORIGINAL, **RAW}, (*goals, *more))


def _latency(operation: str) -> Case:
    contenders: dict[str, Callable[[Stage], Contender]] = {
        **OURS_AND_ORIGINAL,
        "raw, polling": lambda stage: RawLatency(stage, operation),
        "a cache line to the other core and back": lambda stage: RawLatency(stage, "line"),
    }
    return Case(f"tcp 4 KiB × 1 {operation}", Load(operation, 4 * KIB, 1), contenders, (quicker_than_original(0.25),))


def _against_original(operation: str) -> Case:
    contenders: dict[str, Callable[[Stage], Contender]] = {
        "ours": lambda stage: Ours(stage, against_original=True),
        "original": Original,
    }
    goal = faster_than("original", limit=1.3, what="our initiator / its own")
    load = Load(operation, 64 * KIB, 128)
    return Case(f"original's target 64 KiB × 128 {operation}", load, contenders, (goal,))


def _without_pool(operation: str) -> Case:
    """As 0.3.10 and 0.3.12 do by themselves. It was 0.1 once: to notice that, not more."""
    contenders: dict[str, Callable[[Stage], Contender]] = {
        "ours": lambda stage: Original(stage, against_ours=True, pooled=False),
        "original": lambda stage: Original(stage, pooled=False),
    }
    goal = faster_than("original", limit=0.5, what="at our target / at its own")
    load = Load(operation, 64 * KIB, 32, 2)
    return Case(f"original's initiator, no pool, 64 KiB × 32 × 2 {operation}", load, contenders, (goal,))


def _shared_memory(operation: str) -> Case:
    contenders: dict[str, Callable[[Stage], Contender]] = {
        "ours": lambda stage: Ours(stage, protocol="shm"),
        "memcpy": lambda stage: Raw(stage, "memcpy"),
    }
    goal = faster_than("memcpy", limit=0.85, what="ours / np.copyto")
    return Case(f"shm 1 MiB × 32 {operation}", Load(operation, MIB, 32), contenders, (goal,))


CASES = (
    _tcp(Load("read", 4 * KIB, 128), 35),
    _tcp(Load("write", 4 * KIB, 128), 20),
    _tcp(Load("read", 64 * KIB, 128), 2.2, 0.9, CPU),
    _tcp(Load("write", 64 * KIB, 128), 2.2, 0.9, CPU),
    _tcp(Load("read", MIB, 32), 1.5, 0.9),
    _tcp(Load("write", MIB, 32), 1.5, 0.9),
    _tcp(Load("read", 64 * KIB, 128, 12), 10),
    _tcp(Load("write", 64 * KIB, 128, 12), 15),
    *(_latency(operation) for operation in ("read", "write")),
    *(_against_original(operation) for operation in ("read", "write")),
    *(_without_pool(operation) for operation in ("read", "write")),
    *(_shared_memory(operation) for operation in ("read", "write")),
)
