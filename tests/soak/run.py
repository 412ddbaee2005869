"""The soak: starts etcd and workers, kills and stops some of them, samples the others. What `launch/soak` calls.

Exit code 1: bytes were wrong, a transfer with a living peer failed, a worker that is never killed ended, an error was
none of ours, or something grew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.metadata.embedded import EmbeddedEtcd
from mooncake_hpc.metadata.store import open_store
from soak import figures
from soak.worker import STEADY

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".mooncake" / "soak"
PROTOCOLS = ("auto", "tcp", "auto", "auto", "tcp")  # of the workers; those after STEADY are killed and stopped
KILL_INTERVAL_S = (3.0, 8.0)
LONGEST_STOP_S = 2.0


class WorkerProcess:
    """A worker, and what it has told."""

    def __init__(self, etcd: str, index: int, names: Sequence[str]) -> None:
        self.index, self.name = index, names[index]
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.up, self.quiet = threading.Event(), threading.Event()
        self.log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MC_", "MOONCAKE_HPC_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "soak.worker", etcd, PROTOCOLS[index], str(index), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**environment, "PYTHONPATH": str(ROOT / "tests")},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                told = json.loads(line)
            except ValueError:  # killed in the middle of it
                continue
            self.up.set()
            if told.get("quiet"):
                self.quiet.set()
            self.counts.update(told.get("counts", {}))
            self.failures += told.get("failures", [])

    def silence(self) -> None:
        """Have it begin nothing new."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def end(self, kill: bool = False) -> None:
        """By SIGKILL, or as it ends by itself; its log is searched for tracebacks."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if kill:
            self.process.kill()
        self.process.stdin.close()
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            code = self.process.wait(10)
        if code and not kill:
            self.failures.append(f"{self.name} ended with code {code}")
        self._reader.join(10)
        self.process.stdout.close()
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        if (at := text.find("Traceback")) >= 0 or (code and not kill):
            self.failures.append(f"{self.name}'s log: {text[max(0, at - 500) :][:3000]}")
        self.log.close()


@dataclass
class Soak:
    """What has happened."""

    seconds: float
    seed: int
    progress: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    samples: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    killed: int = 0
    stopped: int = 0
    ending: threading.Event = field(default_factory=threading.Event)  # set: end now

    def run(self) -> None:
        self._chance = random.Random(self.seed)
        patient = Settings(metadata_timeout=60.0)  # a busy machine is no finding
        with EmbeddedEtcd() as etcd, open_store(etcd.endpoint, patient) as store:
            names = [f"soak-{index}:1" for index in range(len(PROTOCOLS))]
            workers = [WorkerProcess(etcd.endpoint, index, names) for index in range(len(PROTOCOLS))]
            try:
                for worker in workers:
                    if not worker.up.wait(120):
                        self.failures.append(f"{worker.name} does not start")
                        return
                self._go_on(etcd.endpoint, store, workers, names)
            finally:
                self._end_all(workers)

    def _go_on(self, etcd: str, store: MetadataStore, workers: list[WorkerProcess], names: list[str]) -> None:
        began = time.monotonic()
        interval = max(0.5, min(10.0, self.seconds / 60))
        next_sample, next_kill = began, began + self._chance.uniform(*KILL_INTERVAL_S)
        while (now := time.monotonic()) < began + self.seconds and not self.failures and not self.ending.is_set():
            if now >= next_sample:
                next_sample += interval
                self._sample(now - began, store, workers)
                self._show(now - began)
            if now >= next_kill:
                index = self._chance.randrange(STEADY, len(workers))
                if workers[index].up.is_set():
                    workers[index] = self._disturb(etcd, workers[index], names)
                next_kill = time.monotonic() + self._chance.uniform(*KILL_INTERVAL_S)
            time.sleep(0.1)
            for worker in workers:
                self._take(worker)
                if worker.process.poll() is not None:
                    self.failures.append(f"{worker.name} has ended by itself")
        self.seconds = time.monotonic() - began

    def _disturb(self, etcd: str, worker: WorkerProcess, names: list[str]) -> WorkerProcess:
        """Kill it and start another one of its name, or stop it for a while."""
        if self._chance.random() < 0.5:
            worker.process.send_signal(signal.SIGSTOP)
            time.sleep(self._chance.uniform(0.05, LONGEST_STOP_S))
            worker.process.send_signal(signal.SIGCONT)
            self.stopped += 1
            return worker
        self.killed += 1
        self._end(worker, kill=True)
        return WorkerProcess(etcd, worker.index, names)

    def _end(self, worker: WorkerProcess, kill: bool = False) -> None:
        worker.end(kill)
        self._take(worker)

    def _end_all(self, workers: list[WorkerProcess]) -> None:
        """Together: a worker that goes while others are at work is a lost peer."""
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.silence()
        for worker in workers:
            worker.quiet.wait(60)
        for worker in workers:
            self._end(worker)

    def _take(self, worker: WorkerProcess) -> None:
        self.counts.update(worker.counts)
        worker.counts.clear()
        self.failures += worker.failures
        worker.failures.clear()

    def _sample(self, at: float, store: MetadataStore, workers: list[WorkerProcess]) -> None:
        for worker in workers[:STEADY]:
            for what, value in figures.of_process(worker.process.pid).items():
                self.samples[worker.name, what].append((at, value))
        keys = len(store.list("mooncake"))  # of segments and of objects
        self.samples["etcd", "keys"].append((at, keys))

    def _show(self, at: float) -> None:
        if self.progress:
            done = sum(n for step, n in self.counts.items() if step not in ("bytes", "notifications taken"))
            text = f"{at / 60:6.1f} min{done:>10,} steps{self.killed:>5} killed{self.stopped:>5} stopped"
            print(f"\r{text}", end="", flush=True)

    def report(self) -> int:
        """Print the table; the exit code."""
        found = figures.flatness(self.samples)
        print(f"{'' if not self.progress else chr(13)}{self.seconds / 60:.1f} minutes, seed {self.seed}")
        print(figures.HEAD, *(flat.line() for flat in found), sep="\n")
        print(", ".join(f"{name} {count:,}" for name, count in sorted(self.counts.items())))
        growing = [f"{flat.who} {flat.what}" for flat in found if not flat.flat]
        for failure in self.failures[:20]:
            print(f"FAILED: {failure}")
        bad = self.failures or growing
        print(
            f"{self.killed} killed, {self.stopped} stopped, {len(self.failures)} failures: {'NOT OK' if bad else 'OK'}"
        )
        return 1 if bad else 0

    def keep(self) -> Path:
        """Write the samples to a file."""
        KEPT.mkdir(parents=True, exist_ok=True)
        path = KEPT / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
        samples = {f"{who} {what}": points for (who, what), points in self.samples.items()}
        path.write_text(json.dumps({"seconds": self.seconds, "counts": self.counts, "samples": samples}) + "\n")
        return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch/soak")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long [1]")
    parser.add_argument("--seed", type=int, default=None, help="of kills and stops [random]")
    options = parser.parse_args(arguments)
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    soak = Soak(options.minutes * 60, seed, progress=os.isatty(1))
    for number in (signal.SIGINT, signal.SIGTERM):  # the table of what there is
        signal.signal(number, lambda *_: soak.ending.set())
    soak.run()
    print(f"samples: {soak.keep()}")
    return soak.report()


if __name__ == "__main__":
    sys.exit(main())
