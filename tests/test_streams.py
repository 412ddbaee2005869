"""The commands' standard streams: closed, broken, full, of another encoding; and words that are no text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Start, clean_env
from test_cli import QUICK, SMALL, target

from mooncake_hpc.__main__ import COMMANDS
from mooncake_hpc.cli.streams import OUTPUT_LOST

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-P", "-m", "mooncake_hpc"]
SIGNS = "µ×█…→≥ü\udcff"
ALL_HELP = f"""
from mooncake_hpc.__main__ import main
from mooncake_hpc.cli import streams
assert not any([main(["--help"]), *(main([name, "--help"]) for name in {sorted(COMMANDS)})])
with streams.guarded():
    print({SIGNS!a})
"""
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def shell(words: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `words`, in which $@ is the command, as bash does."""
    command = ["bash", "-c", f"set -o pipefail; {words}", "bash", *COMMAND, *arguments]
    return subprocess.run(command, env=clean_env(**env), capture_output=True, text=True, timeout=60, errors="replace")


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "gbk"}, {"PYTHONIOENCODING": "latin-1"}, ASCII_LOCALE],
    ids=["GBK", "Latin-1", "ASCII"],
)
def test_help_is_shown_in_every_encoding(env: dict[str, str]) -> None:
    run = subprocess.run([sys.executable, "-P", "-c", ALL_HELP], env=clean_env(**env), capture_output=True, timeout=60)
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    encoding = env.get("PYTHONIOENCODING", "ascii")
    last = run.stdout.decode(encoding).splitlines()[-1]
    assert last.endswith("\\udcff")
    if encoding == "ascii":
        assert last == "ux#...->>=\\xfc\\udcff"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ('"$@" >&-', "it is closed"),
        ('"$@" >/dev/full', "No space left on device"),
        ('(sleep 0.3; "$@") | true', "Broken pipe"),
        ('"$@" >&- 2>&- <&-', ""),
        ('"$@" >/dev/full 2>/dev/full', ""),
    ],
)
def test_output_that_is_lost_is_one_line_and_an_exit_code(words: str, says: str) -> None:
    run = shell(words, "--help")
    assert run.returncode == OUTPUT_LOST, run
    lines = run.stderr.splitlines()
    assert len(lines) == bool(says) and all(says in line for line in lines), run


def test_errors_go_nowhere_but_to_standard_error() -> None:
    run = shell('"$@" 2>&-', "bogus")
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "")


@pytest.mark.parametrize("words", ['"$@" >&-', '"$@" >/dev/full'])
def test_an_etcd_whose_endpoint_nobody_reads_ends(words: str) -> None:
    run = shell(words, "etcd")
    assert run.returncode == OUTPUT_LOST and len(run.stderr.splitlines()) == 1, run


def test_without_a_standard_input() -> None:
    run = shell('"$@" <&-', "etcd", "--until_eof")
    assert run.returncode == 2 and "the standard input is closed" in run.stderr and len(run.stderr.splitlines()) == 1
    assert shell('"$@" <&-', "topology").returncode in (0, 1)


def test_a_bench_whose_output_is_lost_keeps_its_result(etcd: str, start: Start, tmp_path: Path) -> None:
    _, command = target(start, etcd, "127.0.0.1:21077", *SMALL)
    file = tmp_path / "result.json"
    words = [*command, *QUICK, f"--json={file}"]
    with open("/dev/full", "wb") as full:
        lost = subprocess.run(words, env=clean_env(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert lost.returncode == OUTPUT_LOST and "No space left" in lost.stderr and "Traceback" not in lost.stderr
    plain = subprocess.run(words, env=clean_env(**ASCII_LOCALE), capture_output=True, timeout=60)
    assert plain.returncode == 0 and b"\nus a batch above" in plain.stdout and not plain.stderr, plain
    assert [json.loads(line)["errors"] for line in file.read_text(encoding="utf-8").splitlines()] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        ([b"bench", b"--local_server_name=a\xff:1", b"--metadata_server=a:1"], {}),
        ([b"p2p", b"ls", b"--name=\xe4", b"--metadata_server=a:1"], {}),
        ([b"bench", b"--metadata_server=a:1", b"--mode=target"], {b"MC_METADATA_CLUSTER_ID": b"\xff"}),
        ([b"bench", b"--fromenv=json"], {b"FLAGS_json": b"\xff"}),
        ([b"\xff"], {}),
        ([b"launch", b"--", b"bench", b"--name\xff=1"], {}),
    ],
)
def test_words_that_are_not_utf8_are_one_line_and_exit_code_2(arguments: list[bytes], env: dict[bytes, bytes]) -> None:
    run = subprocess.run(
        [*COMMAND, *arguments], env={**{os.fsencode(k): os.fsencode(v) for k, v in clean_env().items()}, **env},
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 2 and run.stderr.startswith(b"mooncake-hpc") and b"Traceback" not in run.stderr, run
