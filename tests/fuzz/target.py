"""What every fuzzed thing has: a process of its own, which must live, say nothing of a traceback, and not grow."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

TESTS = Path(__file__).resolve().parent.parent

Case = list[list[bytes]]
"""What is sent: connections (or values), each a list of messages. The unit of what a fuzzer runs, saves and shrinks."""


class Finding(Exception):
    """The target did what it must not."""


class Node:
    """A Python process that runs `fuzz.node KIND`, asked by JSON lines."""

    def __init__(self, kind: str, pass_fds: Sequence[int] = ()) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self._seen = 0
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MC_", "MOONCAKE_HPC_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fuzz.node", kind, *map(str, pass_fds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**kept, "PYTHONPATH": str(TESTS), "PYTHONUNBUFFERED": "1"},
            pass_fds=pass_fds,
        )
        self._received = b""
        self.hello = self._reply(60.0)

    @property
    def pid(self) -> int:
        return self.process.pid

    def call(self, command: str, *arguments: Any, timeout: float = 30.0) -> Any:
        """What the command returns. Finding where the node ends or keeps silent."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            self.check_alive()
            raise
        return self._reply(timeout)

    def _reply(self, timeout: float) -> Any:
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.process.send_signal(signal.SIGABRT)  # faulthandler shows where it hangs
                self.process.wait(10)
                raise Finding(f"the target does not answer within {timeout:g} s\n{self.log()[-4000:]}")
            part = os.read(self.process.stdout.fileno(), 1 << 20)
            if not part:
                self.process.wait(10)
                self.check_alive()
                raise Finding(f"the target has ended\n{self.log()[-4000:]}")
            self._received += part
        line, self._received = self._received.split(b"\n", 1)
        reply = json.loads(line)
        if "error" in reply:
            raise Finding(reply["error"])
        return reply["result"]

    def log(self) -> str:
        """What it has written to standard error since the last call."""
        self._log.seek(self._seen)
        text = self._log.read()
        self._seen += len(text)
        return text.decode(errors="replace")

    def check_alive(self) -> None:
        """Finding where the process has ended, or a thread of it has shown a traceback."""
        code = self.process.poll()
        text = self.log()
        if code is not None:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise Finding(f"the target has ended: {how}\n{text[-4000:]}")
        if (at := text.find("Traceback")) >= 0:
            raise Finding(f"a traceback in the target's log:\n{text[max(0, at - 300) :][:4000]}")

    def resources(self) -> dict[str, int]:
        """Descriptors, threads, and resident KiB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        words = {
            line.split(":")[0]: line.split()[1] for line in status.splitlines() if ":" in line and line.split()[1:]
        }
        return {
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": int(words["Threads"]),
            "rss_kib": int(words["VmRSS"]),
        }

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self._log.close()


class Target(ABC):
    """Something that takes input from outside. `frames` counts what it was given, by what a message is there."""

    name: str
    unit = "frames"
    shrinks = True  # by running parts of a case; else it has made it small itself
    most: ClassVar[dict[str, int]] = {"descriptors": 64, "threads": 64, "rss_kib": 128 << 10}
    """By how much a node may grow, however long the run."""

    def __init__(self) -> None:
        self.frames = 0
        self.node: Node | None = None

    def start(self) -> None:
        """A fresh node."""
        self.stop()
        self.node = self.launch()
        self.settled: dict[str, int] | None = None

    def stop(self) -> None:
        if self.node is not None:
            self.node.close()
            self.node = None

    @abstractmethod
    def launch(self) -> Node: ...

    @abstractmethod
    def generate(self, chance: Random) -> Case: ...

    @abstractmethod
    def run(self, case: Case) -> None:
        """Give it to the node and compare. Raises Finding."""

    @abstractmethod
    def serve_check(self) -> None:
        """Raises Finding where a client that does nothing wrong is not served."""

    def check(self) -> None:
        """After some cases: it lives, serves, and has not grown. Raises Finding."""
        assert self.node is not None
        self.node.check_alive()
        self.serve_check()
        self.node.check_alive()
        now = self.node.resources()
        if self.settled is None:  # the first cases have filled its pools
            self.settled = now
        deadline = time.monotonic() + 8.0
        while grown := {
            k: (self.settled[k], now[k]) for k, most in self.most.items() if now[k] > self.settled[k] + most
        }:
            if time.monotonic() > deadline:
                raise Finding(f"the target has grown (before, now): {grown}")
            time.sleep(0.2)
            now = self.node.resources()
