"""The original as a peer: its versions, its command and its Python API, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, clean_env

VERSIONS = ("0.3.13.post1", "0.3.12.post1", "0.3.10.post2")
NEWEST = VERSIONS[0]
OUR_BENCH = (sys.executable, "-m", "mooncake_hpc", "bench")
RESULT = re.compile(r"Test completed: duration ([\d.]+), batch count (\d+), throughput ([\d.]+) GB/s")
PORT = re.compile(r"listening on 127\.0\.0\.1:(\d+)")

# Runs under the original's Python: reads JSON calls [method, arguments...] from stdin, answers a JSON line each
PYTHON_API = """
import ctypes, hashlib, json, os, random, sys
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # the original logs to stdout
from mooncake.engine import TransferEngine, TransferNotify, TransferOpcode
name, metadata, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
engine = TransferEngine()
assert engine.initialize(name, metadata, "tcp", "") == 0
buffer = ctypes.create_string_buffer(length)
base = ctypes.addressof(buffer)
assert engine.register_memory(base, length) == 0
answers.write(json.dumps([engine.get_rpc_port(), base]) + "\\n")

def notify(target, address, name, text):
    return engine.transfer_sync(target, base, address, 0, TransferOpcode.Read, TransferNotify(name, text))

def get_notifies():
    return [[n.name, n.msg] for n in engine.get_notifies()]

def fill(seed):
    ctypes.memmove(buffer, random.Random(seed).randbytes(length), length)

def digest():
    return hashlib.sha256(memoryview(buffer)).hexdigest()

own = {"notify": notify, "get_notifies": get_notifies, "fill": fill, "digest": digest}
for line in sys.stdin:
    method, *arguments = json.loads(line)
    call = own.get(method) or getattr(engine, method, None)
    answers.write(json.dumps(call(*arguments) if call else "absent") + "\\n")
os._exit(0)
"""


def peer_python(version: str) -> Path:
    """The Python with this version of the original; MOONCAKE_PEER_PYTHON stands in for the newest."""
    path = ROOT / ".mooncake" / "peers" / version / "bin" / "python"
    chosen = os.environ.get("MOONCAKE_PEER_PYTHON") if version == NEWEST else None
    if not chosen and not path.exists():
        text = f"no Python with the original's {version} at {path}; launch/test sets it up"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    return Path(chosen) if chosen else path


def peer_bench(version: str) -> tuple[str, ...]:
    """The original's bench as a command, logging to stderr.

    The binary itself: the wheel's command of that name starts it and, when killed, leaves it running.
    """
    folder = peer_python(version).parent.parent
    binary = next(folder.glob("lib/python*/site-packages/mooncake/transfer_engine_bench"))
    binary.chmod(0o755)
    return (str(binary), "--logtostderr")


def peer_env(**extra: str) -> dict[str, str]:
    """For a process of the original, or one of ours beside it: on loopback."""
    return clean_env(MC_TCP_BIND_ADDRESS="127.0.0.1", **extra)


class Peer:
    """A TransferEngine of the original with one registered buffer of `length` bytes at `buffer`."""

    def __init__(
        self, version: str = NEWEST, length: int = 1 << 16, metadata: str = "P2PHANDSHAKE",
        name: str = "127.0.0.1:12345", **env: str,
    ) -> None:  # fmt: skip
        command = [str(peer_python(version)), "-c", PYTHON_API, name, metadata, str(length)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=peer_env(MC_LOG_LEVEL="ERROR", **env),
        )  # fmt: skip
        self.length = length
        self.port, self.buffer = self._answer()
        self.name = f"127.0.0.1:{self.port}" if metadata == "P2PHANDSHAKE" else name

    def call(self, method: str, *arguments: object) -> Any:
        """The method's answer, or "absent" where this version has none of that name."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            pytest.fail(f"the original ended: {self.process.stderr.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


def run_bench(command: Sequence[str], *flags: str, timeout: float = 60, **env: str) -> tuple[int, float]:
    """Run an initiator, ours or the original's, to its end: batches and seconds of its result line."""
    done = subprocess.run(
        [*command, "--mode=initiator", "--protocol=tcp", *flags],
        cwd=ROOT, env=peer_env(**env), timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    found = RESULT.search(done.stdout)
    if done.returncode or found is None or "FAILED" in done.stdout:
        pytest.fail(f"exit code {done.returncode} of {' '.join(done.args)}:\n{done.stdout[-3000:]}")
    return int(found[2]), float(found[1])


@contextlib.contextmanager
def bench_target(
    command: Sequence[str], *flags: str, ready: Callable[[str], str], timeout: float = 30, **env: str
) -> Iterator[str]:
    """A running bench target; yields the name that `ready` finds in its output (empty: not ready yet)."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, "--mode=target", "--protocol=tcp", *flags],
            cwd=ROOT, env=peer_env(**env), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + timeout
            while not (name := ready(_text(output))):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"{' '.join(command)} is not ready:\n{_text(output)[-3000:]}")
                time.sleep(0.05)
            yield name
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10)


def _text(file: Any) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")  # the writer keeps its position
