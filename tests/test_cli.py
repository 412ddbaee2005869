"""The command lines in separate processes: target and initiator, their output, exit codes and endings."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Start, clean_env

from mooncake_hpc.__main__ import COMMANDS, main
from mooncake_hpc.core.address import is_local
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.embedded import EmbeddedEtcd
from mooncake_hpc.metadata.store import open_store

BENCH = (sys.executable, "-m", "mooncake_hpc", "bench")
FINAL = re.compile(r"^Test completed: duration (\d+\.\d\d), batch count (\d+), throughput (\d+\.\d\d) GB/s$")
SMALL = ("--block_size=4096", "--batch_size=8", "--threads=2", "--buffer_size=1048576")
QUICK = (*SMALL, "--duration=0.5")


def run(*flags: str, command: Sequence[str] = BENCH, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60, env=clean_env(**env))


def target(start: Start, metadata: str, name: str, *flags: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A target that is ready, and the words of the initiator's command that it printed."""
    where = (f"--metadata_server={metadata}", f"--local_server_name={name}", "--protocol=tcp")
    process = start(*BENCH, "--mode=target", *where, *flags)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "initiator's command" in line:
            return process, shlex.split(next(process.stdout))
    pytest.fail(f"target ended with {process.wait()}:\n{''.join(lines)}")


def test_help_and_version() -> None:
    shown = run("--help")
    assert shown.returncode == 0 and "--block_size  (int, bytes; default 65536)" in shown.stdout
    assert run("--version").stdout.startswith("mooncake-hpc ")
    assert main(["--version"]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_help_and_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And starts nothing."""
    for flag, begin in (("--help", "usage: "), ("--version", "mooncake-hpc ")):
        assert main([name, flag]) == 0
        assert capsys.readouterr().out.startswith(begin)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--blok_size=1"], "unknown flag --blok_size; did you mean --block_size"),
        ([], "--metadata_server is missing"),
        (["--metadata_server=127.0.0.1:1"], "--segment_id is missing"),
        (["--metadata_server=a:1", "--segment_id=b:1", "--block_size=0"], "--block_size=0 must be at least 1"),
        (["--metadata_server=a:1", "--mode=target", "--buffer_size=9000000000000000"], "bytes of memory"),
        (["--metadata_server=a:1", "--mode=target", "--device_name=nic_7"], "no RDMA device nic_7; /sys/class"),
        (["--metadata_server=embedded", "--segment_id=b:1", "--protocol=tcp"], "needs its target's metadata server"),
        (["--metadata_server=http://a:1/m", "--segment_id=b:1", "--protocol=tcp"], "http"),
        (["--metadata_server=a:1", "--segment_id=b:1", "--json=/nowhere/x"], "cannot be written"),
        (["--metadata_server=a:1", "--segment_id=b:1", "--report_precision=99"], "--report_precision=99"),
    ],
)
def test_flags_that_cannot_be(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_target_and_the_printed_command(etcd: str, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    serving, command = target(start, etcd, "127.0.0.1:21001", *SMALL)
    shown = run("--duration=0.5", f"--json={file}", "--verify", command=command)
    assert shown.returncode == 0, shown
    match = FINAL.match(shown.stdout.splitlines()[-1])
    assert match and int(match[2]) > 0 and "carried by tcp" in shown.stdout
    [line] = file.read_text().splitlines()
    result = json.loads(line)
    assert result["schema"] == 2 and result["transports"] == ["tcp"] and result["errors"] == 0
    assert result["config"]["block_size"] == 4096 and result["machine"]["cores"] >= 1
    assert result["wrong_bytes"] == 0 < result["compared_bytes"]
    assert result["batches"] == int(match[2]) and result["initiators"][0]["pid"] > 0
    assert result["batch_latency_us"]["p50"] <= result["batch_latency_us"]["max"]
    assert 0 < result["request_latency_us"]["p99.9"] <= result["batch_latency_us"]["max"]
    assert sum(result["initiators"][0]["lane_bytes"].values()) >= result["bytes"]
    assert serving.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["read", "write"])
def test_cpu_of_both_sides_and_units(etcd: str, start: Start, tmp_path: Path, operation: str) -> None:
    file = tmp_path / "result.json"
    _, command = target(start, etcd, "127.0.0.1:21002", *SMALL)
    units = ("--report_unit=MiB", "--report_precision=0")
    shown = run(f"--operation={operation}", "--duration=0.5", f"--json={file}", *units, command=command)
    assert re.search(r"throughput \d+ MiB/s$", shown.stdout.splitlines()[-1]), shown
    result = json.loads(file.read_text())
    assert result["target_cpu_seconds"] > 0 and result["initiator_cpu_seconds"] > 0


@pytest.mark.slow
def test_modules_of_the_current_folder_stay_out(etcd: str, start: Start, tmp_path: Path) -> None:
    """With `python -P`, here and in the command that a target prints."""
    (tmp_path / "random.py").write_text("raise SystemExit('imported from the current folder')")
    program = [sys.executable, "-P", "-m", "mooncake_hpc", "bench", "--mode=target", "--protocol=tcp", *SMALL]
    process = start(*program, f"--metadata_server={etcd}", "--local_server_name=127.0.0.1:21013", cwd=tmp_path)
    assert process.stdout is not None and "is ready" in process.stdout.readline()
    command = shlex.split(process.stdout.readline())
    shown = subprocess.run([*command, "--duration=0.1"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert shown.returncode == 0, shown


def keys(etcd: str, name: str) -> list[str]:
    with open_store(etcd, Settings()) as store:
        return [key for key in store.list("mooncake/") if key.endswith(name)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_target_ends_cleanly_and_removes_its_keys(etcd: str, start: Start, number: signal.Signals) -> None:
    name = f"127.0.0.1:{21100 + number}"
    process, _ = target(start, etcd, name, *SMALL)
    assert len(keys(etcd, name)) == 2
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 0 and output.splitlines()[-1] == f"target {name} ends"
    assert keys(etcd, name) == []


@pytest.mark.slow
def test_a_killed_target_restarts_under_its_name_at_once(etcd: str, start: Start) -> None:
    first, _ = target(start, etcd, "127.0.0.1:21003", *SMALL)
    first.kill()
    first.wait()
    _, command = target(start, etcd, "127.0.0.1:21003", *SMALL)
    shown = run("--duration=0.3", command=command)
    assert shown.returncode == 0, shown


@pytest.mark.slow
def test_a_living_targets_name_is_refused(etcd: str, start: Start) -> None:
    target(start, etcd, "127.0.0.1:21004", *SMALL)
    second = run("--mode=target", f"--metadata_server={etcd}", "--local_server_name=127.0.0.1:21004", "--protocol=tcp")
    assert second.returncode == 1 and "NameInUse" in second.stderr and "127.0.0.1:21004" in second.stderr
    assert "another name (--local_server_name" in second.stderr


@pytest.mark.slow
def test_a_target_that_is_too_small_is_noticed_before_the_run(etcd: str, start: Start) -> None:
    _, command = target(start, etcd, "127.0.0.1:21005", *SMALL)
    shown = run("--block_size=1048576", command=command)
    assert shown.returncode == 2 and "start the target with --buffer_size=16777216" in shown.stderr


@pytest.mark.slow
def test_nobody_has_the_name(etcd: str) -> None:
    result = run(f"--metadata_server={etcd}", "--segment_id=nobody:1", "--protocol=tcp", *QUICK)
    assert result.returncode == 1 and "SegmentNotFound" in result.stderr and "nobody:1" in result.stderr


@pytest.mark.slow
def test_no_etcd() -> None:
    begin = time.monotonic()
    result = run(
        "--metadata_server=127.0.0.1:9", "--segment_id=b:1", "--protocol=tcp", *QUICK, MOONCAKE_HPC_METADATA_TIMEOUT="1"
    )
    assert result.returncode == 1 and "MetadataUnavailable" in result.stderr and "127.0.0.1:9" in result.stderr
    assert time.monotonic() - begin < 15


@pytest.mark.slow
def test_a_target_killed_in_mid_run_fails_the_initiator(etcd: str, start: Start) -> None:
    process, command = target(start, etcd, "127.0.0.1:21006", *SMALL)
    initiator = start(*command, "--duration=30")
    assert initiator.stdout is not None
    for line in initiator.stdout:
        if line.startswith("connected"):
            break
    time.sleep(0.3)
    process.kill()
    output, _ = initiator.communicate(timeout=20)
    assert initiator.returncode == 1 and "FAILED: PeerLost" in output, output


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, as many as can still be read."""
    try:
        below = [
            int(word)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for word in (task / "children").read_text().split()
        ]
    except OSError:
        return []
    return [*below, *(pid for child in below for pid in descendants(child))]


@pytest.mark.slow
def test_workers_killed_in_mid_run_cost_no_transfer(etcd: str, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    _, command = target(start, etcd, "127.0.0.1:21009", "--buffer_size=67108864")
    flags = ("--buffer_size=67108864", "--workers=2", "--verify", "--verify_interval=4", "--duration=3")
    process = start(*command, *flags, f"--json={file}")
    killed: set[int] = set()
    while process.poll() is None and len(killed) < 6:
        time.sleep(0.3)
        for pid in set(descendants(process.pid)) - killed:
            with contextlib.suppress(OSError):
                if "mooncake_hpc.workers" in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                    break
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and killed, output
    result = json.loads(file.read_text())
    assert result["errors"] == result["wrong_bytes"] == 0 < result["compared_bytes"]


@pytest.mark.slow
@pytest.mark.skipif(not is_local("::1"), reason="hardware: this machine has no IPv6")
def test_ipv6_from_end_to_end(start: Start) -> None:
    with EmbeddedEtcd("::1") as server:
        _, command = target(start, server.endpoint, "[::1]:21010", *SMALL)
        shown = run("--duration=0.3", "--local_server_name=[::1]:21011", command=command)
    assert shown.returncode == 0 and "[::1]:21011 -> [::1]:21010" in shown.stdout, shown


@pytest.mark.slow
def test_without_any_metadata_server(start: Start) -> None:
    _, command = target(start, "P2PHANDSHAKE", "127.0.0.1:21007", *SMALL)
    shown = run("--duration=0.3", command=command)
    assert shown.returncode == 0 and FINAL.match(shown.stdout.splitlines()[-1]), shown


@pytest.mark.slow
def test_a_target_with_an_embedded_etcd(start: Start) -> None:
    process, command = target(start, "embedded", "127.0.0.1:21008", *SMALL)
    shown = run("--duration=0.3", command=command)
    assert shown.returncode == 0, shown
    process.terminate()
    assert process.wait(timeout=10) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "carrier"), [("shm", "shm"), ("auto", "shm"), ("", "tcp")])
def test_protocols(etcd: str, start: Start, protocol: str, carrier: str) -> None:
    flags = [f"--protocol={protocol}"] if protocol else []
    words = [f"--metadata_server={etcd}", "--local_server_name=127.0.0.1:21009", *SMALL, *flags]
    process = start(*BENCH, "--mode=target", *words)
    assert process.stdout is not None
    for line in process.stdout:
        if "initiator's command" in line:
            break
    words[1] = "--local_server_name=127.0.0.1:21010"
    shown = run(*words, "--segment_id=127.0.0.1:21009", "--duration=0.3")
    assert shown.returncode == 0 and f"carried by {carrier}:" in shown.stdout, shown
    assert ("using tcp" in shown.stderr) == (not protocol)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--verify"]], ids=["plain", "verify"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_initiator_that_is_interrupted_says_what_it_measured(
    etcd: str, start: Start, tmp_path: Path, flags: list[str], number: signal.Signals, code: int
) -> None:
    """It is no result: no closing line, no JSON."""
    _, command = target(start, etcd, "127.0.0.1:21011", *SMALL)
    initiator = start(*command, "--duration=60", *flags, f"--json={tmp_path / 'result.json'}")
    assert initiator.stdout is not None
    for line in initiator.stdout:
        if line.startswith("connected"):
            break
    time.sleep(0.5)
    initiator.send_signal(number)
    output, _ = initiator.communicate(timeout=10)
    assert initiator.returncode == code, output
    said = re.search(
        r"^INTERRUPTED before the 60 s were over: duration (\S+), batch count (\d+), throughput", output, re.M
    )
    assert said and 0 < float(said[1]) < 30 and int(said[2]) > 0, output
    assert "Test completed" not in output and not (tmp_path / "result.json").exists()
    assert keys(etcd, "127.0.0.1:21012") == []


@pytest.mark.slow
def test_log_flags(etcd: str, tmp_path: Path) -> None:
    result = run(
        f"--metadata_server={etcd}", "--segment_id=nobody:1", "--protocol=tcp", *QUICK, "-v=1", f"--log_dir={tmp_path}"
    )
    assert result.returncode == 1
    assert list(tmp_path.glob("mooncake-hpc.*.log"))


def test_embedded_etcd_command(start: Start) -> None:
    process = start(sys.executable, "-m", "mooncake_hpc", "etcd")
    assert process.stdout is not None
    endpoint = process.stdout.readline().strip()
    assert keys(endpoint, "") == []
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0


def test_embedded_etcd_ends_with_its_input() -> None:
    command = [sys.executable, "-m", "mooncake_hpc", "etcd", "--until_eof"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_env()
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert keys(process.stdout.readline().strip(), "") == []
        process.stdin.write("words\n")
        process.stdin.close()
        assert process.wait(timeout=10) == 0


def test_warm_does_nothing_twice_but_knows_processors_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mooncake_hpc.cli import warm
    from mooncake_hpc.native import cache_files as files

    monkeypatch.delenv("NUMBA_CPU_NAME", raising=False)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    files.write(str(tmp_path / f"kernel{files.SUFFIX}"), bytes(files.DIGEST_BYTES), b"code")
    here = warm._stamp(str(tmp_path))
    assert here == warm._stamp(str(tmp_path))
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    other = warm._stamp(str(tmp_path))
    assert other != here
    warm._write_stamp(other)
    command = [sys.executable, "-m", "mooncake_hpc", "warm"]
    env = clean_env(NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_NAME="generic")
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "after" not in result.stdout, result
