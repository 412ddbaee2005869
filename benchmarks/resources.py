"""What a process of ours costs: memory, idle time, what `import` loads, and whether kernels are compiled again."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from contenders import ROOT, Stage, run

MB, MIB = 1e6, 2.0**20
HEAVY = ("numba", "llvmlite", "grpc", "etcd3", "mpi4py", "pyverbs")
IMPORT = f"import mooncake_hpc, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
FIRST_BATCHES = 1000  # of the process that may compile


@dataclass(frozen=True, slots=True)
class Fact:
    """A figure and the most that it may be."""

    what: str
    value: float
    limit: float
    unit: str
    note: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def facts(stage: Stage, batches: int, idle: float) -> list[Fact]:
    """Measure all. Raises contenders.Failed."""
    loaded, _ = run([sys.executable, "-c", IMPORT], 60)
    heavy = json.loads(loaded.replace("'", '"'))
    _probe(stage, FIRST_BATCHES, 0.1)
    told = _probe(stage, batches, idle)
    result = []
    for side in ("initiator", "target"):
        grown = told[f"{side}_growth_bytes"] / MB
        result += [
            Fact(f"{side}: memory beside the buffers", told[f"{side}_bytes"] / MB, 260, "MB"),
            Fact(f"{side}: growth over {batches} batches", max(grown, 0.0), 2, "MB"),
            Fact(f"{side}: CPU while idle", 100 * told[f"{side}_idle_cores"], 1, "% of a core"),
        ]
    return [
        *result,
        Fact("worker: memory beside the buffers", told["worker_bytes"] / MB, 150, "MB"),
        Fact("heavy modules that `import mooncake_hpc` loads", len(heavy), 0, "modules", ", ".join(heavy)),
        Fact("kernels that a second process compiles", told["compiled"], 0, "kernels"),
    ]


def _probe(stage: Stage, batches: int, idle: float) -> dict[str, float]:
    target = stage.ours("tcp")
    flags = {
        "metadata": stage.metadata, "name": stage.unused_name(), "segment": target.name, "target": target.pid,
        "batches": batches, "idle": idle,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in flags.items()]
    text, _ = run([sys.executable, str(ROOT / "benchmarks" / "probe.py"), *words], 120 + batches / 5000)
    told: dict[str, float] = json.loads(text.splitlines()[-1])
    return told
