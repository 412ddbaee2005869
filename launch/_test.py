"""Run the parts of the test suite one after the other; called by launch/test once everything is set up.

A part fails when its command fails, outlives its time, or skips a test: what a test needs is set up
beforehand, so a skip is a hole. Two kinds of skip are fine: pytest-mpi's, where a test wants another number
of ranks, and those whose reason starts with "hardware:".
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / ".mooncake" / "test"
ACCEPTED_SKIPS = ("hardware:", "Test requires", "need at least", "Tests marked")


@dataclass
class Part:
    """A named list of commands, `limit` seconds together; each may leave a JUnit file in OUT/<name>."""

    name: str
    commands: list[list[str]]
    limit: float
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    complaints: list[str] = field(default_factory=list)


def parts(fast: bool, mpirun: str, extra: list[str]) -> list[Part]:
    """All parts in the order in which they run."""
    python = sys.executable
    ruff = [python, "-m", "ruff"]
    pytest = ["-m", "pytest", "-q", *extra]
    chosen = ["-m", "not slow and not interop"] if fast else []
    unit = [python, *pytest, *chosen, "--durations=8", "--ignore=tests/mpi"]
    result = [
        Part("lint", [[*ruff, "check", "."], [*ruff, "format", "--check", "."], [python, "-m", "mypy"]], 300),
        Part("unit", [[*unit, "--junitxml", str(OUT / "unit" / "r.xml")]], 1500),
    ]
    for ranks in (2,) if fast else (1, 2, 4):
        folder = OUT / f"mpi{ranks}"
        wrapper = [str(ROOT / "launch" / "_rank.sh"), str(folder)]
        command = [mpirun, *launcher_options(mpirun), "-n", str(ranks), *wrapper]
        # `-m mpi4py` and -x: a failing rank ends the job instead of leaving the others in a barrier.
        tests = [python, "-m", "mpi4py", *pytest, "-x", "--with-mpi", *chosen, "tests/mpi"]
        result.append(Part(f"mpi{ranks}", [[*command, *tests, "--junitxml", str(folder / "r.xml")]], 300))
    return result


def launcher_options(mpirun: str) -> list[str]:
    """Open MPI wants to be told that root and more ranks than cores are meant; Hydra needs nothing."""
    text = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30).stdout.lower()
    if "open mpi" not in text and "prrte" not in text:
        return []
    return ["--oversubscribe", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]


def run(part: Part) -> None:
    """Run the part's commands to the end, all of them; fills in its figures."""
    folder = OUT / part.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    for command in part.commands:
        left = part.limit - (time.monotonic() - start)
        code = run_command(command, left)
        if code is None:
            part.complaints.append(f"not done after {part.limit:.0f} s: {' '.join(command[:6])} …")
        elif code:
            part.complaints.append(f"exit code {code}: {' '.join(command[:6])} …")
    part.seconds = time.monotonic() - start
    read_results(part, folder)
    if part.complaints:
        for log in sorted(folder.glob("rank*.log")):
            print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-25:], sep="\n")


def run_command(command: list[str], limit: float) -> int | None:
    """The exit code, or None when the time was up; then, and on Ctrl-C, the whole process group is ended."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            stop_group(process)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=5)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def read_results(part: Part, folder: Path) -> None:
    """Count the test cases of the part's JUnit file and complain about skips."""
    if part.name == "lint":
        part.passed, part.failed = len(part.commands) - len(part.complaints), len(part.complaints)
        return
    file = folder / "r.xml"
    if not file.exists():
        part.complaints.append("no test report was written")
        return
    for case in xml.parse(file).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            part.failed += 1
        elif skip is None:
            part.passed += 1
        elif not skip.get("message", "").startswith(ACCEPTED_SKIPS) and skip.get("type") != "pytest.xfail":
            where = f"{case.get('classname')}::{case.get('name')}"
            part.complaints.append(f"skipped {where}: {skip.get('message')}")


def report(done: list[Part], setup: float) -> int:
    """The closing table; the exit code."""
    print(f"\n{'part':<10}{'seconds':>9}{'passed':>8}{'failed':>8}")
    if setup:
        print(f"{'set-up':<10}{setup:>9.1f}")
    for part in done:
        print(f"{part.name:<10}{part.seconds:>9.1f}{part.passed:>8}{part.failed:>8}")
    passed, failed = sum(p.passed for p in done), sum(p.failed for p in done)
    print(f"{'all':<10}{setup + sum(p.seconds for p in done):>9.1f}{passed:>8}{failed:>8}")
    complaints = [f"{p.name}: {c}" for p in done for c in p.complaints]
    for complaint in complaints:
        print(complaint)
    bad = failed or complaints
    print(f"{passed} passed" + (f", {failed} failed, {len(complaints)} complaints: NOT OK" if bad else ""))
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/test")
    parser.add_argument("--fast", action="store_true", help="leave out slow tests and the original as a peer")
    parser.add_argument("--mpirun", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--setup-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--pytest", default="", help="arguments for pytest, in one word: --pytest='-k etcd'")
    parser.add_argument("part", nargs="*", help="only these: lint unit mpi1 mpi2 mpi4")
    options = parser.parse_args()
    all_parts = parts(options.fast, options.mpirun, options.pytest.split())
    unknown = set(options.part) - {p.name for p in all_parts}
    if unknown:
        known = ", ".join(p.name for p in all_parts)
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {known}")
    chosen = [p for p in all_parts if not options.part or p.name in options.part]
    for part in chosen:
        print(f"== {part.name}", flush=True)
        run(part)
    return report(chosen, options.setup_seconds)


if __name__ == "__main__":
    sys.exit(main())
