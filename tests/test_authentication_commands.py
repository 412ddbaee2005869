"""Secrets on command lines and in jobs: the right one is passed along, others are told of, and none is shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Start, clean_env
from test_cli import QUICK, SMALL, run, target

from mooncake_hpc.__main__ import main

SECRET = "a secret that no output shows"
P2P = (sys.executable, "-m", "mooncake_hpc", "p2p")


def secret_file(folder: Path, content: str = SECRET) -> str:
    path = folder / f"secret-{abs(hash(content))}"
    path.write_text(content + "\n")
    path.chmod(0o600)
    return str(path)


def shown(*done: subprocess.CompletedProcess[str]) -> str:
    return "".join(one.stdout + one.stderr for one in done)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--secret_file=/nowhere/secret"], "/nowhere/secret' .* cannot be read: No such file"),
        (["--secret_file=/etc/passwd"], "has the mode 0644"),
        (["--allow_unauthenticated=127.0.0.1"], "without --secret_file"),
    ],
)
def test_a_secret_that_cannot_be_had(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["bench", "--metadata_server=a:1", "--mode=target", "--protocol=tcp"],
        ["p2p", "--metadata_server=a:1", "--cmd=trainer", "--protocol=tcp", "--size=1"],
    ):
        assert main([*command, *flags]) == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_a_bench_with_a_secret(etcd: str, start: Start, tmp_path: Path) -> None:
    right, wrong = secret_file(tmp_path), secret_file(tmp_path, "another secret of some length")
    result = tmp_path / "result.json"
    _, command = target(start, etcd, "127.0.0.1:21071", *SMALL, f"--secret_file={right}")
    assert f"--secret_file={right}" in command
    good = run("--duration=0.5", f"--json={result}", "-v=1", command=command)
    assert good.returncode == 0, good
    bad = run("--duration=0.5", command=[word.replace(right, wrong) for word in command])
    assert bad.returncode == 1 and "segment '127.0.0.1:21071' at 127.0.0.1:" in bad.stderr
    assert "has another secret than this process" in bad.stderr
    assert SECRET not in shown(good, bad) + result.read_text()


@pytest.mark.slow
def test_an_object_is_pulled_with_the_secret(etcd: str, start: Start, tmp_path: Path) -> None:
    right = secret_file(tmp_path)
    where = (f"--metadata_server={etcd}", "--name=guarded", "--protocol=tcp")
    trainer = start(
        *P2P, "--cmd=trainer", *where, "--size=1000000", "--local_server_name=127.0.0.1:21073",
        f"--secret_file={right}", env=clean_env(MC_TCP_BIND_ADDRESS="127.0.0.1"),
    )  # fmt: skip
    assert trainer.stdout is not None
    assert any(f"--secret_file={right}" in line for line in iter(trainer.stdout.readline, ""))
    pull = (*where, "--cmd=inferencer", "--local_server_name=127.0.0.1:21074", "--linger=0", "--timeout=20")
    good = run(*pull, f"--secret_file={right}", command=P2P, MC_TCP_BIND_ADDRESS="127.0.0.1")
    assert good.returncode == 0, good
    assert SECRET not in shown(good)


@pytest.mark.slow
def test_ranks_of_a_job_have_the_secret(mpirun: str, tmp_path: Path) -> None:
    command = (mpirun, "-n", "2", sys.executable, "-m", "mooncake_hpc", "bench")
    flags = ("--metadata_server=embedded", "--protocol=tcp", *QUICK)
    done = run(*flags, command=command, MOONCAKE_HPC_SECRET_FILE=secret_file(tmp_path))
    assert done.returncode == 0 and SECRET not in shown(done), done
