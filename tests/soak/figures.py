"""Samples of what must stay flat, the line through them, and the table at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WARM_UP = 0.25  # share of the samples, from the beginning, that is left out: pools fill
TOLERANCE = {"rss_mib": 12.0, "descriptors": 8.0, "threads": 8.0, "keys": 8.0}
"""By how much the fitted line may rise from the end of the warm-up to the end of the soak."""


@dataclass(frozen=True)
class Flatness:
    """Of one figure of one process: its first and last value on the fitted line, and the extremes."""

    who: str
    what: str
    first: float
    last: float
    least: float
    most: float

    @property
    def grown(self) -> float:
        return self.last - self.first

    @property
    def flat(self) -> bool:
        return self.grown <= TOLERANCE[self.what]

    def line(self) -> str:
        figures = "".join(f"{value:>10.1f}" for value in (self.first, self.last, self.grown, self.least, self.most))
        return (
            f"{self.who:<12}{self.what:<12}{figures}{'' if self.flat else f'   GROWS, above {TOLERANCE[self.what]:g}'}"
        )


HEAD = f"{'who':<12}{'what':<12}{'first':>10}{'last':>10}{'grown':>10}{'least':>10}{'most':>10}"


def of_process(pid: int) -> dict[str, float]:
    """Its resident MiB, descriptors and threads. Raises OSError when it is gone."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    words = {line.partition(":")[0]: line.split()[1] for line in status if len(line.split()) > 1}
    return {
        "rss_mib": int(words["VmRSS"]) / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(words["Threads"]),
    }


def flatness(samples: Mapping[tuple[str, str], Sequence[tuple[float, float]]]) -> list[Flatness]:
    """A line by least squares through the samples (seconds, value) of each (who, what)."""
    found = []
    for (who, what), points in samples.items():
        kept = points[int(len(points) * WARM_UP) :]
        times, values = (np.array(column, float) for column in zip(*kept, strict=True))
        slope, start = np.polyfit(times - times[0], values, 1) if len(kept) > 2 else (0.0, values.mean())
        ends = float(start), float(start + slope * (times[-1] - times[0]))
        found.append(Flatness(who, what, *ends, float(values.min()), float(values.max())))
    return found
