"""Results as JSON and as a Markdown table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cases import Case, Goal, Round
from contenders import Sample
from resources import Fact

from mooncake_hpc.bench.report import machine

SCHEMA = 1
BESIDE = "original", "before"  # contenders that do the same work as ours


@dataclass(slots=True)
class CaseResult:
    """The rounds of a case. `others`: cores that were busy with what is not ours, a round."""

    case: Case
    rounds: list[Round] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    failure: str = ""
    began: str = ""  # of an earlier run, from which this case is kept

    def median(self, contender: str, figure: str) -> float | None:
        values = [getattr(seen[contender], figure) for seen in self.rounds]
        return None if not values or None in values else median(values)

    def ratios(self, goal: Goal) -> list[float]:
        return [goal.figure(seen) for seen in self.rounds]

    def met(self, goal: Goal) -> bool:
        return bool(self.rounds) and not self.failure and goal.met(median(self.ratios(goal)))


@dataclass(slots=True)
class Results:
    """A whole run."""

    options: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    facts_failure: str = ""
    began: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S%z"))
    seconds: float = 0.0
    again: int = 0  # samples that were taken again, as the cores were nearer each other, or farther, than usual

    @property
    def missed(self) -> list[str]:
        """What was not reached, in words."""
        found = [
            f"{result.case.name}: {goal.what} {goal.text}"
            for result in self.cases
            for goal in result.case.goals
            if not result.met(goal)
        ]
        found += [f"{fact.what} ≤ {fact.limit:g} {fact.unit}" for fact in self.facts if not fact.met]
        return found + ([f"resources: {self.facts_failure}"] if self.facts_failure else [])

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "began": self.began,
            "seconds": self.seconds,
            "machine": machine(),
            "options": self.options,
            "again": self.again,
            "cases": [_case_dict(result) for result in self.cases],
            "facts": [{**asdict(fact), "met": fact.met} for fact in self.facts],
            "missed": self.missed,
        }

    def keep(self, file: Path, known: Sequence[Case]) -> None:
        """Take over from an earlier run's JSON what is not among these cases; all in the order of `known`.

        Raises OSError, and KeyError, TypeError or ValueError for a file of another kind.
        """
        earlier = json.loads(file.read_text(encoding="utf-8"))
        named = {told["name"]: told for told in earlier["cases"]}
        here = {result.case.name: result for result in self.cases}
        for case in known:
            if case.name in named and case.name not in here:
                told = named[case.name]
                rounds = [{name: Sample(**sample) for name, sample in seen.items()} for seen in told["rounds"]]
                began = told.get("began") or earlier["began"]
                here[case.name] = CaseResult(case, rounds, told["others_cores"], told["failure"], began)
        self.cases = [here[case.name] for case in known if case.name in here]

    def write(self, folder: Path, name: str = "bench") -> None:
        """<name>.json and <name>.md. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        (folder / f"{name}.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        here = machine()
        busy = [others for result in self.cases for others in result.others]
        lines = [
            f"Measured {self.began} on {here['cores']} cores ({here['cpu']}), Linux {here['kernel']}, "
            f"Python {here['python']}, mooncake_hpc {here['mooncake_hpc']}: {self.options['pairs']} rounds a case, "
            f"{self.options['seconds']:g} s a run. Medians; ratios are medians of the rounds' own (least to greatest).",
        ]
        if busy:
            lines.append(
                f"Other work on the machine used {median(busy):.2f} cores in the median round, {max(busy):.2f} at most."
            )
        if self.again:
            lines.append(taken_again(self.again))
        for began in dict.fromkeys(result.began for result in self.cases if result.began):
            names = [result.case.name for result in self.cases if result.began == began]
            lines.append(f"Of a run that began {began}: {'; '.join(names)}.")
        if self.cases:
            lines += ["", *_speed_table(self.cases)]
        if self.facts:
            lines += ["", *table(["resource", "seen", "reach", ""], [_fact_row(fact) for fact in self.facts])]
        for result in self.cases:
            if result.failure:
                lines += ["", f"{result.case.name} failed: {result.failure}"]
            failures = sum(sample.failures for seen in result.rounds for sample in seen.values())
            if failures:
                lines += ["", f"{result.case.name}: {failures} runs of the original failed and were tried again."]
        if self.facts_failure:
            lines += ["", f"resources failed: {self.facts_failure}"]
        return "\n".join(lines) + "\n"


def taken_again(count: int) -> str:
    """How many samples were, and why."""
    return f"{count} samples were taken again: the cores were nearer each other, or farther, than usual."


def progress_line(result: CaseResult) -> str:
    """One case, for the terminal."""
    if result.failure:
        return f"{result.case.name}: FAILED: {result.failure}"
    parts = [f"{name} {_speed(result, name)}" for name in result.case.contenders]
    for goal in result.case.goals:
        verdict = "ok" if result.met(goal) else "MISSED"
        parts.append(f"{goal.what} {spread(result.ratios(goal))} (reach {goal.text}: {verdict})")
    return f"{result.case.name}: " + ", ".join(parts)


def _case_dict(result: CaseResult) -> dict[str, Any]:
    return {
        "name": result.case.name,
        "load": asdict(result.case.load),
        "rounds": [{name: sample.as_dict() for name, sample in seen.items()} for seen in result.rounds],
        "others_cores": result.others,
        "failure": result.failure,
        "began": result.began,
        "goals": [
            {
                "what": goal.what, "limit": goal.limit, "at_least": goal.at_least, "met": result.met(goal),
                "rounds": (ratios := result.ratios(goal)), "median": median(ratios) if ratios else None,
            }
            for goal in result.case.goals
        ],
    }  # fmt: skip


def _speed_table(results: list[CaseResult]) -> list[str]:
    others = list(dict.fromkeys(name for r in results for name in r.case.contenders if name != "ours"))
    rows = []
    for result in results:
        speeds = [_speed(result, name) if name in result.case.contenders else "" for name in ("ours", *others)]
        cpu = [
            _number(result.median(name, "cpu_seconds_per_gb"))
            for name in ("ours", *BESIDE)
            if name in result.case.contenders
        ]
        for number, goal in enumerate(result.case.goals):
            first = [result.case.name, *speeds, " / ".join(cpu)] if number == 0 else [""] * (len(speeds) + 2)
            ratios = result.ratios(goal)
            seen = spread(ratios) if ratios else "failed"
            rows.append([*first, goal.what, seen, goal.text, mark(result.met(goal))])
    beside = next((name for name in BESIDE if name in others), BESIDE[0])
    head = ["case", "ours", *others, f"CPU s/GB (ours / {beside})", "figure", "seen", "reach", ""]
    return table(head, rows)


def _speed(result: CaseResult, contender: str) -> str:
    """Throughput, or where one small request goes at a time, its latency: median, least and greatest."""
    if not result.rounds:
        return "-"
    load = result.case.load
    if load.batch * load.threads == 1:
        return _range([1e6 / seen[contender].requests_per_second for seen in result.rounds], "µs")
    rates = [seen[contender].bytes_per_second for seen in result.rounds]
    return _range([r / 1e9 for r in rates], "GB/s") if median(rates) > 5e8 else _range([r / 1e6 for r in rates], "MB/s")


def _range(values: list[float], unit: str) -> str:
    digits = 1 if unit == "MB/s" else 2
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f}) {unit}"


def _fact_row(fact: Fact) -> list[str]:
    note = f" ({fact.note})" if fact.note else ""
    return [fact.what, f"{fact.value:.3g} {fact.unit}{note}", f"≤ {fact.limit:g}", mark(fact.met)]


def mark(met: bool) -> str:
    return "reached" if met else "**missed**"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
