"""The comparison: every case's contenders in turn, round after round, then what a process of ours costs."""

from __future__ import annotations

import argparse
import fnmatch
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cases import CASES, Case, against
from contenders import Contender, Failed, Stage
from load import Calm, Watch
from report import CaseResult, Results, progress_line
from resources import facts

FACTS = "resources"
RESULTS = Path(__file__).resolve().parent / "results"
MIN_BUFFER = 64 << 20  # bytes


def own_seconds(stage: Stage) -> float:
    """CPU seconds of this process, its ended children and the running targets."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts) + stage.cpu_seconds()


def run_case(
    case: Case, stage: Stage, options: argparse.Namespace, tell: Callable[[str], None], calm: Calm
) -> CaseResult:
    """All rounds of a case. A contender that fails ends it, and is told in the result."""
    result = CaseResult(case)
    interrupts = options.suite == "tcp"  # what they cost is nobody else's work where devices are made of software
    contenders: dict[str, Contender] = {name: make(stage) for name, make in case.contenders.items()}
    try:
        for number in range(options.pairs):
            watch = Watch(lambda: own_seconds(stage), interrupts)
            seen = {}
            for name, contender in contenders.items():
                tell(f"{case.name}: round {number + 1} of {options.pairs}, {name}")
                seen[name] = calm.sample(partial(contender.measure, case.load, options.seconds))
            result.rounds.append(seen)
            result.others.append(watch.others())
    except Failed as error:
        result.failure = str(error)
    return result


def suite(name: str) -> Sequence[Case]:
    """The cases on loopback, or those over RDMA."""
    if name == "rdma":
        from rdma_cases import CASES as RDMA_CASES

        return RDMA_CASES
    return CASES


def choose(cases: Sequence[Case], patterns: Sequence[str]) -> tuple[list[Case], bool]:
    """The cases whose names match one of the patterns (all without any), and whether resources are asked for."""

    def wanted(name: str) -> bool:
        return not patterns or any(fnmatch.fnmatch(name, f"*{pattern}*") for pattern in patterns)

    return [case for case in cases if wanted(case.name)], cases is CASES and wanted(FACTS)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run",
        description="Measures ours and the original in turn on loopback, with raw sockets and memcpy as baselines; "
        "writes bench.json and bench.md. Exit code: 0, whatever was reached; 1 when something failed.",
    )
    parser.add_argument(
        "case",
        nargs="*",
        help=f"only cases whose names hold one of these, * and ? allowed; {FACTS!r} is memory, idle time and start-up",
    )
    parser.add_argument("--list", action="store_true", help="list the cases and end")
    parser.add_argument("--pairs", type=int, default=5, help="rounds a case [%(default)s]")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="length of a run; the original's are whole [%(default)s]"
    )
    parser.add_argument("--batches", type=int, default=1_000_000, help="over which memory may not grow [%(default)s]")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds of idleness to look at [%(default)s]")
    parser.add_argument(
        "--calm",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="before each case wait at most this long for others to leave the machine alone, and take samples again "
        "for as long in which the host moved our cores [%(default)s]",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help="measure this build beside that of another checkout, which is set up, instead of beside the original",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="[benchmarks/results]")
    parser.add_argument(
        "--keep", action="store_true", help="cases that are not run now stay in the results as the last run left them"
    )
    parser.add_argument("--suite", choices=("tcp", "rdma"), default="tcp", help=argparse.SUPPRESS)
    parser.add_argument("--original", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.pairs < 1 or options.seconds <= 0 or options.batches < 1 or options.idle <= 0:
        parser.error("--pairs, --seconds, --batches and --idle must be above 0")
    return options


def measure(options: argparse.Namespace, cases: list[Case], with_facts: bool, results: Results) -> None:
    """Fill in the results, telling of each on stderr."""
    terminal = sys.stderr.isatty()

    def tell(text: str) -> None:
        if terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def say(text: str) -> None:
        print(f"\r\033[K{text}" if terminal else text, file=sys.stderr, flush=True)

    largest = max([MIN_BUFFER, *(case.load.footprint for case in cases)])
    with Stage(options.original, largest) as stage:
        calm = Calm(0.1, options.calm, tell)
        for case in cases:
            calm.wait()
            results.cases.append(run_case(case, stage, options, tell, calm))
            say(progress_line(results.cases[-1]))
        results.again = calm.again
        if with_facts:
            tell(f"{FACTS}: {options.batches} batches")
            try:
                results.facts += facts(stage, options.batches, options.idle)
            except Failed as error:
                results.facts_failure = str(error)
        tell("")


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    known = suite(options.suite)
    cases, with_facts = choose(known, options.case)
    if options.against is not None:
        cases, with_facts = [against(case, options.against) for case in cases], False
    if options.list:
        print("\n".join([*(case.name for case in known), *([FACTS] if known is CASES else [])]))
        return 0
    if not cases and not with_facts:
        print(f"benchmarks/run: no case matches {' '.join(options.case)}; see --list", file=sys.stderr)
        return 2
    shown = {name: getattr(options, name) for name in ("pairs", "seconds", "batches", "idle", "calm")}
    results = Results({**shown, "load_average": os.getloadavg()[0]})
    begin = time.monotonic()
    try:
        measure(options, cases, with_facts, results)
    except KeyboardInterrupt:
        print("\ninterrupted: writing what there is", file=sys.stderr)
    results.seconds = round(time.monotonic() - begin, 1)
    name = "rdma" if options.suite == "rdma" else "bench"
    if options.against is not None:
        name += "-against"
    if options.keep:
        results.keep(options.output / f"{name}.json", known)
    results.write(options.output, name)
    print(results.markdown())
    for text in results.missed:
        print(f"not reached: {text}", file=sys.stderr)
    failed = [result for result in results.cases if result.failure] or results.facts_failure
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
