"""Virtual hosts with limited links, an etcd beside them, and a node on each that takes orders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from contenders import ROOT, Failed, cpu_of, environment

START_TIMEOUT = 120.0  # seconds
LEAD = 0.3  # seconds from an order to the time at which all begin
NODE = str(ROOT / "benchmarks" / "p2p_node.py")
VIRTUAL_HOSTS = str(ROOT / "launch" / "virtual-hosts")

Answer = dict[str, Any]


class Child:
    """A process that prints lines and, if it is a node, answers orders. A context manager that ends it."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self._command = " ".join(command)
        self._process = subprocess.Popen([*command], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    @property
    def pid(self) -> int:
        return self._process.pid

    def line(self) -> str:
        """The next line that it prints. Failed when it has ended."""
        assert self._process.stdout is not None
        if text := self._process.stdout.readline():
            return text.strip()
        raise Failed(f"{self._command} has ended with {self._process.wait(10)}")

    def send(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Answer:
        """Raises Failed for an error."""
        answer: Answer = json.loads(self.line())
        if "error" in answer:
            raise Failed(f"{self._command}: {answer['error']}")
        if answer.get("wrong_bytes"):
            raise Failed(f"{self._command}: {answer['wrong_bytes']} bytes are wrong")
        return answer

    def do(self, what: str, **order: Any) -> Answer:
        self.send(do=what, **order)
        return self.answer()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Hosts:
    """A set of virtual hosts, of this process's own name. A context manager."""

    def __init__(self, number: int, rate: str) -> None:
        self.number, self.rate = number, rate
        self.env = {**environment(), "VIRTUAL_HOSTS": f"p2p-{os.getpid()}"}
        del self.env["MC_TCP_BIND_ADDRESS"]

    def __enter__(self) -> Hosts:
        words = [VIRTUAL_HOSTS, "up", str(self.number), self.rate, "--owner", str(os.getpid())]
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=START_TIMEOUT)
        if done.returncode:
            raise Failed(f"{' '.join(words)}: {done.stderr}")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([VIRTUAL_HOSTS, "down"], env=self.env, timeout=START_TIMEOUT, check=False)

    def on(self, host: str, *command: str) -> list[str]:
        """What runs a command there."""
        return [VIRTUAL_HOSTS, "run", host, "--", *command]


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


class Fleet:
    """An etcd and nodes: on virtual hosts, node I on host I, or without `hosts` all here. A context manager."""

    def __init__(self, number: int, hosts: Hosts | None, protocol: str) -> None:
        self._number, self._hosts, self._protocol = number, hosts, protocol
        self._stack = ExitStack()
        self.nodes: list[Child] = []
        self.metadata = ""
        self._etcd: Child | None = None

    def __enter__(self) -> Fleet:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        python = [sys.executable]
        etcd = [*python, "-m", "mooncake_hpc", "etcd"]
        if self._hosts is not None:
            etcd = self._hosts.on("hub", *etcd, "--listen=10.77.0.254")
        env = self._hosts.env if self._hosts is not None else environment()
        self._etcd = self._stack.enter_context(_Etcd(etcd, env))
        self.metadata = self._etcd.line()
        for number in range(self._number):
            command = [*python, NODE, self.name(number), self.metadata, self._protocol]
            if self._hosts is not None:
                command = self._hosts.on(f"h{number}", *command)
            self.nodes.append(self._stack.enter_context(Child(command, env)))
        for node in self.nodes:
            node.answer()

    def name(self, number: int) -> str:
        """The node's segment."""
        return f"{address(number)}:12345" if self._hosts is not None else f"127.0.0.1:{12345 + number}"

    def all(self, numbers: Sequence[int], what: str, **order: Any) -> list[Answer]:
        """The same order to several nodes at once; their answers."""
        for number in numbers:
            self.nodes[number].send(do=what, **order)
        answers, failures = [], []
        for number in numbers:
            try:
                answers.append(self.nodes[number].answer())
            except Failed as error:
                failures.append(str(error))
        if failures:
            raise Failed("; ".join(failures))
        return answers

    def cpu_seconds(self) -> float:
        """CPU seconds of nodes and etcd so far."""
        pids = [node.pid for node in self.nodes] + ([self._etcd.pid] if self._etcd else [])
        return sum(cpu_of(pid) + sum(cpu_of(child) for child in _descendants(pid)) for pid in pids)


class _Etcd(Child):
    """Ends by SIGTERM; it reads nothing."""

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        super().__exit__()


def _descendants(pid: int) -> list[int]:
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for word in words for found in (int(word), *_descendants(int(word)))]


def soon() -> float:
    """A time for all to begin at."""
    return time.monotonic() + LEAD
