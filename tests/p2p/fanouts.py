"""Fan-outs of real processes that are killed: a program that forks a trainer and readers, trial after trial.

    fanouts.py ETCD PLAN    PLAN is JSON: a list of trials, see `Trial`; prints a line of JSON a trial, in any order

It has no thread and no connection when it forks, and has loaded all kernels: a process costs milliseconds. Sources are
slowed down (a pause a piece), so that a fan-out takes a part of a second and a kill falls into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mooncake_hpc.core.errors import MooncakeError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.engine.remote_segment import Segment
from mooncake_hpc.jobs import kernel_cache as warm
from mooncake_hpc.native import prepare
from mooncake_hpc.p2p import P2PStore
from mooncake_hpc.p2p import fetcher as source

SHARD = 1 << 16
TTL = 2.0
PATIENCE = 60.0  # seconds for a trial


@dataclass(slots=True)
class Trial:
    """`kill` is whom (0: the trainer), `at` when: seconds after the start, or "spread": once all shards have left the
    trainer. `stop` (pid, after, for how long) suspends another process meanwhile: an etcd."""

    name: str
    readers: int = 3
    shards: int = 48
    pause: float = 0.01
    kill: int = -1
    at: float | str = 0.0
    stop: tuple[int, float, float] | None = None
    port: int = 30000
    ttl: float = TTL


@dataclass(slots=True)
class Reader:
    """How a reader ended: `error` is "" or the type's name; `wrong` bytes; `left`: what it had not given back."""

    error: str = "?"
    wrong: int = -1
    seconds: float = 0.0
    left: list[str] = field(default_factory=list)
    verified_at: list[float] = field(default_factory=list)  # seconds after the start, by shard as they came


def serve(trial: Trial, etcd: str, ready: Callable[[], None]) -> None:
    """The trainer, until it is ended."""
    with P2PStore(f"127.0.0.1:{trial.port}", etcd, protocol="tcp", settings=settings(trial)) as store:
        model = store.allocate(trial.shards * SHARD)
        prepare.fill(model, 1)
        store.register(trial.name, model, shard_size=SHARD)
        ready()
        while True:  # signal.pause() may miss a signal that comes just before it
            time.sleep(0.05)


def settings(trial: Trial) -> Settings:
    return Settings(lease_ttl=trial.ttl, tcp_bind_address="127.0.0.1")


def read(trial: Trial, etcd: str, number: int, told: int, start: Callable[[], None]) -> Reader:
    """A reader; each verified shard is told to the file descriptor `told`, as a byte pair."""
    slow_down(trial.pause)
    result = Reader()
    with P2PStore(f"127.0.0.1:{trial.port + number}", etcd, protocol="tcp", settings=settings(trial)) as store:
        model = store.allocate(trial.shards * SHARD)
        start()
        begin = time.monotonic()

        def verified(_: object, shard: int) -> None:
            result.verified_at.append(time.monotonic() - begin)
            os.write(told, shard.to_bytes(2, "little"))

        try:
            store.get_replica(trial.name, model, timeout=PATIENCE, on_shard=verified)
            result.error = ""
        except MooncakeError as error:
            result.error = type(error).__name__
            print(f"{trial.name}: reader {number}: {error}", file=sys.stderr)
        result.seconds = time.monotonic() - begin
        result.wrong = prepare.verify(model, 1)
        if not result.error:
            store.wait_unused(trial.name, 2.5 * 0.25, 15.0)
        del model
    result.left = leftovers()
    return result


def slow_down(pause: float) -> None:
    step = source.Worker._step

    def slowly(worker: source.Worker, segment: Segment) -> None:
        time.sleep(pause)
        step(worker, segment)

    source.Worker._step = slowly  # type: ignore[method-assign]


def leftovers() -> list[str]:
    """Memory files and threads of ours that a closed store has left."""
    gc.collect()
    found = [thread.name for thread in threading.enumerate() if thread.name.startswith("mooncake")]
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{fd}")
            if "memfd" in link:
                found.append(link)
    return found


def fork(work: Callable[[], Any], output: int) -> int:
    """A child that writes what `work` returns as JSON to `output`, and ends with it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        result = work()
        os.write(output, json.dumps(result).encode())
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


class Run:
    """One trial."""

    def __init__(self, trial: Trial, etcd: str) -> None:
        self._trial, self._etcd = trial, etcd
        self._told, self._tell = os.pipe()
        self._start, self._started = os.pipe()
        self._results: dict[int, int] = {}  # reader: descriptor of its result
        self._pids: dict[int, int] = {}

    def run(self) -> dict[str, Any]:
        trial = self._trial
        ready, publish = os.pipe()

        def trainer() -> None:
            for fd in (self._started, self._tell):
                os.close(fd)
            serve(trial, self._etcd, lambda: os.write(publish, b"+") and None)

        self._pids[0] = fork(trainer, publish)
        os.close(publish)
        assert os.read(ready, 1) == b"+", "the trainer does not start"
        os.close(ready)
        waiting, arrive = os.pipe()
        for number in range(1, 1 + trial.readers):
            self._results[number], output = os.pipe()

            def reader(number: int = number) -> dict[str, Any]:
                os.close(self._started)

                def start() -> None:
                    os.write(arrive, b"+")
                    os.read(self._start, 1)  # its end

                return asdict(read(trial, self._etcd, number, self._tell, start))

            self._pids[number] = fork(reader, output)
            os.close(output)
        for _ in range(trial.readers):
            os.read(waiting, 1)
        os.close(waiting)
        os.close(arrive)
        os.close(self._started)
        os.close(self._tell)
        return self._conduct(time.monotonic())

    def _conduct(self, begin: float) -> dict[str, Any]:
        trial, seen, killed = self._trial, set(), -1.0
        waiting = {fd: number for number, fd in self._results.items()}
        told = True
        texts = dict.fromkeys(self._results, b"")
        stops = [] if trial.stop is None else [(trial.stop[1], signal.SIGSTOP), (sum(trial.stop[1:]), signal.SIGCONT)]
        while waiting and time.monotonic() - begin < PATIENCE:
            ready, _, _ = select.select([*waiting, *([self._told] if told else [])], [], [], 0.002)
            for fd in ready:
                text = os.read(fd, 4096)
                if fd == self._told:
                    seen |= {int.from_bytes(text[at : at + 2], "little") for at in range(0, len(text), 2)}
                    told = bool(text)
                elif text:
                    texts[waiting[fd]] += text
                else:
                    del waiting[fd]
            now = time.monotonic() - begin
            due = len(seen) == trial.shards if trial.at == "spread" else now >= float(trial.at)
            if trial.kill >= 0 and killed < 0 and due:
                killed = now
                os.kill(self._pids[trial.kill], signal.SIGKILL)
            while stops and trial.stop is not None and now >= stops[0][0]:
                os.kill(trial.stop[0], stops.pop(0)[1])
        result = {
            "name": trial.name, "kill": trial.kill, "killed": killed, "left_trainer": len(seen),
            "readers": {number: json.loads(text) if text else None for number, text in texts.items()},
            "hung": sorted(waiting.values()), "seconds": time.monotonic() - begin,
        }  # fmt: skip
        self._end(trial)
        return result

    def _end(self, trial: Trial) -> None:
        for number, pid in self._pids.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if number in self._results else signal.SIGINT)
        ended = time.monotonic() + 10
        for pid in self._pids.values():
            while not os.waitpid(pid, os.WNOHANG)[0]:
                if time.monotonic() > ended:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
        for fd in (self._told, self._start, *self._results.values()):
            os.close(fd)


def _run(etcd: str, plan: list[dict[str, Any]], at_once: int, turns: int) -> list[int]:
    """Each trial in a process, so many at once; how they ended. Whoever has a result to print locks `turns`."""
    running, ends = 0, []
    for values in plan:
        if running == at_once:
            ends.append(os.wait()[1])
            running -= 1
        if os.fork() == 0:
            code = 1
            try:
                line = json.dumps(Run(Trial(**values), etcd).run())
                fcntl.lockf(turns, fcntl.LOCK_EX)  # a pipe takes so long a line in parts, with others' between them
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        running += 1
    return ends + [os.wait()[1] for _ in range(running)]


def main() -> None:
    etcd, plan, at_once = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    warm.transfer("tcp")
    prepare.verify(np.zeros(8, np.uint8), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryFile() as turns:
        assert not any(_run(etcd, plan, at_once, turns.fileno())), "a trial could not be made"
    assert not Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


if __name__ == "__main__":
    main()
