"""The launch scripts and jobs under mpirun, as subprocesses: what is printed, exit codes, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, Start, clean_env

FINAL = re.compile(r"^Test completed: duration \d+\.\d\d, batch count \d+, throughput \d+\.\d\d GB/s$")
QUICK = (
    "--block_size=4096", "--batch_size=8", "--threads=2", "--buffer_size=1048576", "--duration=0.5", "--timeout=15",
)  # fmt: skip


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, env=clean_env(**env))


def processes(word: str) -> list[int]:
    """Processes of this machine whose command line has `word`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if word in line:
                found.append(int(entry.name))
    return found


def test_launch_bench_runs_a_whole_job(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    result = run("launch/bench", *QUICK, f"--json={file}", "--verify")
    assert result.returncode == 0, result
    lines = result.stdout.splitlines()
    assert FINAL.match(lines[-1]), lines
    assert sum(line.startswith("Test completed") for line in lines) == 1
    report = json.loads(file.read_text())
    assert report["transports"] == ["tcp"] and report["wrong_bytes"] == 0 < report["compared_bytes"]


@pytest.mark.slow
def test_launch_bench_with_four_ranks_sums_up() -> None:
    result = run("launch/bench", *QUICK, "--pattern=all_to_all", NP="4")
    assert result.returncode == 0, result
    rows = [line for line in result.stdout.splitlines() if " -> " in line or line.startswith("sum ")]
    assert len(rows) == 5 and rows[-1].startswith("sum ")
    assert re.search(r"^CPU: \d+\.\d\d s, of ranks that are initiator and target at once$", result.stdout, re.M), result


def test_launch_bench_help_needs_no_launcher() -> None:
    result = run("launch/bench", "--help")
    assert result.returncode == 0 and "--block_size" in result.stdout


@pytest.mark.parametrize(
    "script", ["setup-rdma", "slurm-sandbox", "soft-roce", "soft-roce-vm", "test", "virtual-hosts"]
)
def test_help_sets_nothing_up(tmp_path: Path, script: str) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    result = run(str(tmp_path / "launch" / script), "--help")
    head = (ROOT / "launch" / script).read_text().splitlines()[1]
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith(head.removeprefix("# ")), result
    assert [file.name for file in tmp_path.iterdir()] == ["launch"]


def test_a_checkout_that_cannot_be_written_is_told() -> None:
    """One of another user's, who has not set it up."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        shutil.copytree(ROOT / "launch", Path(folder) / "launch")
        shutil.copy(ROOT / "pyproject.toml", folder)
        Path(folder).chmod(0o555)
        command = ["bash", f"{folder}/launch/bench", "--duration=1"]
        somebody = 65534 if os.getuid() == 0 else None
        result = subprocess.run(
            command, cwd="/", env={"PATH": os.environ["PATH"]}, user=somebody, capture_output=True, text=True
        )
        Path(folder).chmod(0o755)
    assert result.returncode == 1 and result.stdout == "", result
    assert "let its owner run this once" in result.stderr and len(result.stderr.splitlines()) == 1, result


@pytest.mark.slow
def test_no_etcd_is_told_by_one_rank() -> None:
    words = ["--pattern=all_to_all", "--protocol=tcp", "--metadata_server=127.0.0.1:9"]
    result = run("launch/run", "--ranks=3", "--", "bench", *words, *QUICK, MOONCAKE_HPC_METADATA_TIMEOUT="1")
    assert result.returncode != 0 and result.stdout == "", result
    assert result.stderr.count("MetadataUnavailable") == 1 and "rank 0 on" in result.stderr, result


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("launch/bench --blok_size=1", "bench: unknown flag --blok_size; did you mean --block_size"),
        (
            "launch/run --ranks=2 -- p2p --nam=x --metadata_server=embedded",
            "p2p: unknown flag --nam; did you mean --name",
        ),
        ("launch/run -- bench --metadata_server=embedded --segment_id=x", "bench: --segment_id has no meaning"),
        ("launch/run -- bench --metadata_server=embedded --report_precision=99", "--report_precision=99"),
        ("launch/run --ranks=3 -- bench --metadata_server=embedded", "--pattern=pairs needs an even number of ranks"),
        ("launch/run --ranks=2 bench --protocol=tcp", "unexpected argument 'bench': the command to run comes after --"),
        ("launch/run --ranks=2", "nothing to run"),
        ("launch/bench --protocol=rdma --device_name=nobody_0", "no RDMA device nobody_0; /sys/class/infiniband has"),
        (f"launch/bench --buffer_size={1 << 60}", f"buffer_size = {1 << 60} bytes, but this machine has"),
        (
            f"launch/run -- p2p --metadata_server=embedded --protocol=tcp --size={1 << 60}",
            f"a model of {1 << 60} bytes, but this machine has",
        ),
    ],
)
def test_mistakes_are_told_once_and_before_ranks_start(command: str, message: str) -> None:
    result = run(*command.split())
    assert result.returncode == 2 and result.stdout == "", result
    assert result.stderr.count(message) == 1 == len(result.stderr.splitlines()), result.stderr


@pytest.mark.slow
def test_a_mistake_that_all_ranks_make_is_told_by_one(mpirun: str) -> None:
    """Under an mpirun that no command of ours started, so that nobody has looked before."""
    bench = [sys.executable, "-m", "mooncake_hpc", "bench", "--metadata_server=embedded", "--protocol=tcp"]
    result = run(mpirun, "-n", "3", *bench, "--blok_size=1")
    assert result.returncode == 2 and result.stderr.count("unknown flag --blok_size") == 1, result


ON_RANKS = 'rank=${PMI_RANK:-$OMPI_COMM_WORLD_RANK}; case $1 in *$rank*) exec "${@:3}" "$2" ;; *) exec "${@:3}" ;; esac'


@pytest.mark.slow
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
@pytest.mark.parametrize(
    ("ranks", "command", "flag", "message"),
    [
        ("012", "bench", "--device_name=nobody_0", r"rank 0 on \S+: ConfigError: .*no RDMA device nobody_0; "),
        ("12", "bench", f"--buffer_size={1 << 60}", r"rank 1 on \S+: ConfigError: .*bytes, but this machine has"),
        ("2", "p2p", f"--size={1 << 60}", r"rank 2 on \S+: ConfigError: .*bytes, but this machine has"),
        ("012", "bench", "--json=/nowhere/x", r"rank 0 on \S+: ConfigError: .*/nowhere cannot be written"),
    ],
    ids=["device", "memory", "p2p", "folder"],
)
def test_what_a_node_does_not_have_is_told_once_and_before_etcd_starts(
    request: pytest.FixtureRequest, tmp_path: Path, library: str, ranks: str, command: str, flag: str, message: str
) -> None:
    """Some ranks get a flag that stands for a node that has no such device, or too little memory."""
    python = sys.executable if library == "mpich" else request.getfixturevalue("openmpi")
    etcd, begun = tmp_path / "etcd", tmp_path / "begun"
    etcd.write_text(f"#!/bin/sh\ntouch {begun}\n")
    etcd.chmod(0o755)
    mark = f"--seed={os.getpid()}{time.monotonic_ns()}"
    program = [python, "-m", "mooncake_hpc", command, "--metadata_server=embedded", mark]
    program += ["--pattern=all_to_all"] if command == "bench" else []
    program += ["--protocol=tcp"] if "device" not in flag else []
    shared, begin = set(os.listdir("/dev/shm")), time.monotonic()
    launch = [python, "-m", "mooncake_hpc", "launch", "--ranks=3", "--", "bash", "-c", ON_RANKS, "rank", ranks, flag]
    result = run(*launch, *program, ETCD_BIN=str(etcd), TMPDIR=str(tmp_path))
    assert result.returncode == 2 and time.monotonic() - begin < 20, result
    lines = re.findall("^rank .*", result.stderr, re.MULTILINE)
    assert len(lines) == 1 and re.match(message, lines[0]), result.stderr
    assert not begun.exists()
    await_end(mark)
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if name.startswith("mooncake")]


UNWELL = """
from mooncake_hpc.jobs.mpi import World, detect
world = World(detect())
with world.guarded():
    if world.rank == 1:
        raise RuntimeError("rank one is unwell")
    if world.rank > 1:
        raise ValueError("others are unwell too")
    world.barrier(60, "the unwell")
"""


@pytest.mark.slow
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
def test_exceptions_on_ranks_end_the_job_and_each_is_told_once(library: str, request: pytest.FixtureRequest) -> None:
    python = sys.executable if library == "mpich" else request.getfixturevalue("openmpi")
    begin = time.monotonic()
    result = run(python, "-m", "mooncake_hpc", "launch", "--ranks=4", "--", python, "-c", UNWELL)
    assert result.returncode != 0 and time.monotonic() - begin < 20, result
    assert re.findall(r"^rank \d", result.stderr, re.MULTILINE) == ["rank 1", "rank 2"], result.stderr
    assert re.search(r"^rank 1 on \S+: RuntimeError: rank one is unwell$", result.stderr, re.M), result.stderr
    assert re.search(r"^rank 2 on \S+: ValueError: others are unwell too$", result.stderr, re.M), result.stderr
    assert result.stderr.count("Traceback") == 2, result.stderr


@pytest.mark.slow
def test_an_exit_code_under_mpich_is_told_with_its_rank() -> None:
    script = "import mpi4py.MPI, os; mpi4py.MPI.COMM_WORLD.rank or os._exit(7); mpi4py.MPI.COMM_WORLD.Barrier()"
    result = run(sys.executable, "-m", "mooncake_hpc", "launch", "--ranks=2", "--", sys.executable, "-c", script)
    assert result.returncode != 0 and re.search(r"^rank 0 on \S+: ended with exit code 7$", result.stderr, re.M), result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "number", "victim", "pattern", "cause"),
    [
        ("mpich", signal.SIGKILL, 1, "all_to_all", r"rank 1 on \S+: ended by signal 9"),
        ("openmpi", signal.SIGKILL, 1, "all_to_all", r"process rank 1 with PID \d+ on node .* exited on\s+signal 9"),
        *(
            (library, signal.SIGSTOP, victim, pattern, rf"TransferTimeout: .*; no answer from rank {victim} on \S+$")
            for library in ("mpich", "openmpi")
            for victim, pattern in ((1, "all_to_all"), (0, "fan_in"))
        ),
    ],
)
def test_a_rank_that_dies_or_stops_ends_the_job(
    start: Start, request: pytest.FixtureRequest, library: str, number: signal.Signals, victim: int, pattern: str,
    cause: str,
) -> None:  # fmt: skip
    """One line tells it, though all others find out at the same time, and no sum over them is printed."""
    python = sys.executable if library == "mpich" else request.getfixturevalue("openmpi")
    mark = f"--seed={os.getpid()}{time.monotonic_ns()}"
    flags = ["--metadata_server=embedded", "--protocol=tcp", f"--pattern={pattern}", "--duration=60", "--timeout=3"]
    job = start(python, "-m", "mooncake_hpc", "launch", "--ranks=4", "--", "bench", *QUICK, *flags, mark)
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("connected"):
            break
    (one,) = [pid for pid in processes(mark) if rank_of(pid) == str(victim)]
    os.kill(one, number)
    output, _ = job.communicate(timeout=30)
    assert job.returncode != 0 and re.search(cause, output, re.MULTILINE), output
    assert len(re.findall(r"^(?:rank \d+ on|\S* ?process rank)", output, re.MULTILINE)) <= 1, output
    assert "sum " not in output and "Test completed" not in output and "Terminated" not in output, output
    await_end(mark)


def await_end(mark: str) -> None:
    deadline = time.monotonic() + 15
    while left := processes(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def rank_of(pid: int) -> str:
    """A process's rank, "" for a launcher and its shell."""
    if Path(f"/proc/{pid}/comm").read_text() == "sh\n":
        return ""
    environment = dict(word.partition("=")[::2] for word in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return environment.get("PMI_RANK") or environment.get("OMPI_COMM_WORLD_RANK") or ""


def test_another_libraries_launcher_is_noticed() -> None:
    command = [sys.executable, "-m", "mooncake_hpc", "bench", "--metadata_server=embedded", "--protocol=tcp", *QUICK]
    result = run(*command, OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2")
    assert result.returncode == 2 and "the launcher and the library do not match" in result.stderr, result


@pytest.mark.slow
def test_ranks_with_a_named_mode_are_processes_on_their_own(mpirun: str, etcd: str) -> None:
    bench = [sys.executable, "-m", "mooncake_hpc", "bench", f"--metadata_server={etcd}", "--protocol=tcp", *QUICK]
    result = run(mpirun, "-n", "2", *bench, "--mode=initiator", "--segment_id=nobody:1")
    assert result.returncode != 0 and result.stderr.count("SegmentNotFound") == 2, result


def start_long_job(start: Start) -> tuple[subprocess.Popen[str], str]:
    """launch/bench in its timed window, and a flag by which its processes are found."""
    mark = f"--seed={os.getpid()}{time.monotonic_ns()}"
    process = start(str(ROOT / "launch" / "bench"), *QUICK, "--duration=60", mark)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("connected"):
            break
    time.sleep(1.0)
    return process, mark


def hydra_files(mpirun: int) -> list[str]:
    """Files that MPICH's mpirun would leave in /tmp where it is interrupted: its proxies have them open."""
    children = Path(f"/proc/{mpirun}/task/{mpirun}/children").read_text().split()
    proxies = [pid for pid in children if Path(f"/proc/{pid}/comm").read_text() == "hydra_pmi_proxy\n"]
    assert proxies, children
    links = [os.readlink(link) for pid in proxies for link in Path(f"/proc/{pid}/fd").iterdir()]
    return [link for link in links if link.startswith("/tmp/")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_launch_bench_ends_everything(start: Start, number: signal.Signals) -> None:
    before = set(processes("--listen-client-urls"))
    process, mark = start_long_job(start)
    assert processes(mark)
    assert not hydra_files(process.pid)
    process.send_signal(number)
    process.wait(timeout=20)
    deadline = time.monotonic() + 15
    while (left := processes(mark) + [p for p in processes("--listen-client-urls") if p not in before]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert not left, left


@pytest.mark.slow
def test_transfer_engine_bench_execs(start: Start, etcd: str) -> None:
    """From its folder, as the original's documents have it; a signal reaches the program itself."""
    words = ["--mode=target", f"--metadata_server={etcd}", "--local_server_name=127.0.0.1:21200", "--protocol=tcp"]
    process = start("./transfer_engine_bench", *words, *QUICK[:4], cwd=ROOT / "launch")
    assert process.stdout is not None
    assert "target 127.0.0.1:21200 is ready" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0


@pytest.mark.slow
def test_set_up_of_a_fresh_checkout(tmp_path: Path) -> None:
    """A copy without .venv makes one on first use and runs; a second use installs nothing. The kernels' folder is
    that of this checkout, which was set up in the same way and has compiled them."""
    checkout = tmp_path / "checkout"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in tracked.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
            (checkout / name).chmod((ROOT / name).stat().st_mode)
    script = str(checkout / "launch" / "transfer_engine_bench")
    env = clean_env()
    first = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=110, env=env)
    assert first.returncode == 0 and first.stdout.startswith("mooncake-hpc"), first
    assert "setting up" in first.stderr
    second = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=30, env=env)
    assert second.returncode == 0 and second.stderr == ""
