"""The fan-out benchmark's results as JSON and Markdown."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from p2p_cases import LINK_GOALS, LINKS, Goal, Round, bound
from p2p_metadata import Metadata
from report import mark, spread, table, taken_again

from mooncake_hpc.bench.report import machine

SCHEMA = 1
HOST_GOALS = (
    Goal("one reader over tcp, verified / the bench at 1 MiB blocks",
         lambda seen: seen["tcp"].rate / seen["bench"].rate, 0.85, at_least=True),
    Goal("8 readers of one host by shared memory / 8 np.copyto",
         lambda seen: seen["shm"].rate / seen["copyto"].rate, 0.7, at_least=True),
)  # fmt: skip


@dataclass(slots=True)
class Results:
    """A whole run. `others`: cores that were busy with what is not ours, a round."""

    options: dict[str, Any]
    links: list[Round] = field(default_factory=list)
    host: list[Round] = field(default_factory=list)
    metadata: list[Metadata] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    again: int = 0  # samples that were taken again, as the cores were nearer each other, or farther, than usual
    failure: str = ""
    began: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S%z"))
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        """p2p.json and p2p.md. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        value = {
            "schema": SCHEMA, "began": self.began, "seconds": self.seconds, "machine": machine(),
            "options": self.options, "others_cores": self.others, "again": self.again, "failure": self.failure,
            "links": [_as_dict(seen) for seen in self.links], "host": [_as_dict(seen) for seen in self.host],
            "metadata": [one.as_dict() for one in self.metadata],
            "goals": [
                {"what": goal.what, "limit": goal.limit, "at_least": goal.at_least, "rounds": values,
                 "met": goal.met(median(values))}
                for goal, values in self._figures()
            ],
        }  # fmt: skip
        (folder / "p2p.json").write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "p2p.md").write_text(self.markdown(), encoding="utf-8")

    def _figures(self) -> list[tuple[Goal, list[float]]]:
        """Goals that could be looked at, with the figure of each round."""
        found = []
        for goals, rounds in ((LINK_GOALS, self.links), (HOST_GOALS, self.host)):
            for goal in goals:
                try:
                    values = [goal.figure(seen) for seen in rounds]
                except KeyError:
                    continue
                if values:
                    found.append((goal, values))
        return found

    def markdown(self) -> str:
        here, options = machine(), self.options
        lines = [
            f"Measured {self.began} on {here['cores']} cores ({here['cpu']}), Linux {here['kernel']}, Python "
            f"{here['python']}: {options['rounds']} rounds. Links of {options['rate']}, an object of {options['size']} "
            f"MiB in shards of {options['shard']} MiB; without limits {options['alone']} MiB for one reader, "
            f"{options['large']} MiB for the readers of one host. "
            "Medians; ratios are medians of the rounds' own (least to greatest)."
        ]  # fmt: skip
        if self.others:
            lines.append(
                f"Other processes used {median(self.others):.2f} cores in the median round, {max(self.others):.2f} at "
                "most."
            )
        if self.again:
            lines.append(taken_again(self.again))
        rows = [
            [goal.what, spread(values), goal.text, mark(goal.met(median(values)))] for goal, values in self._figures()
        ]
        lines += ["", *table(["figure", "seen", "reach", ""], rows)]
        if self.links:
            lines += ["", *self._samples(self.links, [name for name in LINKS if name in self.links[0]])]
        if self.host:
            lines += ["", *self._samples(self.host, list(self.host[0]))]
        if self.metadata:
            lines += ["", "1 TiB in shards of 64 MiB (sizes simulated, a real etcd):", "", *_metadata(self.metadata)]
        if self.failure:
            lines += ["", f"FAILED: {self.failure}"]
        return "\n".join(lines) + "\n"

    def _samples(self, rounds: Sequence[Round], names: Sequence[str]) -> list[str]:
        rows = []
        shards = self.options["size"] / self.options["shard"]
        for name in names:
            samples = [seen[name] for seen in rounds]
            readers = int(name[2:]) if name.startswith("N=") else 0
            efficiency = [
                bound(readers, shards) * seen["N=1"].seconds / seen[name].seconds
                for seen in rounds
                if readers and "N=1" in seen
            ]
            rows.append([
                name, spread([sample.seconds for sample in samples]),
                f"{median(sample.rate for sample in samples) / 1e6:.1f}",
                f"{median(sample.cpu for sample in samples):.2f}", f"{median(sample.seeded for sample in samples):.2f}",
                f"{median(efficiency):.3f}" if efficiency else "",
            ])  # fmt: skip
        head = ["sample", "seconds", "MB/s, all receivers", "CPU s", "objects from the first holder", "efficiency"]
        return table(head, rows)


def _metadata(measured: Sequence[Metadata]) -> list[str]:
    rows = [
        [str(one.holders), str(one.shards), f"{one.manifest:,}", f"{one.record:,}", f"{one.board:,}", f"{one.limit:,}",
         f"{one.writes:.0f}", f"{one.events:.0f}"]
        for one in measured
    ]  # fmt: skip
    head = ["holders", "shards", "manifest, bytes", "largest record, bytes", "board, bytes", "etcd's limit, bytes"]
    return table([*head, "etcd writes a second", "events a second, all watches"], rows)


def _as_dict(seen: Round) -> dict[str, Any]:
    return {name: sample.as_dict() for name, sample in seen.items()}
