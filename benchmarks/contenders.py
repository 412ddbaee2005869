"""What is measured in turn: ours and the original's bench through their commands, and the baselines of raw.py.

Targets are started once a run and live until its end, initiators are new processes for every sample.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from load import TICK

from mooncake_hpc.metadata.embedded import EmbeddedEtcd
from mooncake_hpc.metadata.store import open_store

if TYPE_CHECKING:
    from rdma_nursery import Nursery

ROOT = Path(__file__).resolve().parent.parent
RESULT = re.compile(r"Test completed: duration ([\d.]+), batch count (\d+),")
START_TIMEOUT = 60.0  # seconds for a target to be ready
TRIES = 5  # for a sample of the original: on a busy machine it gives requests up after a second in its queue
EXTRA_TIMEOUT = 120.0  # seconds beyond its duration for an initiator to end
LAUNCHERS = ("PMI", "PMIX", "OMPI", "PRTE", "HYDRA", "MPI", "SLURM")


@dataclass(frozen=True, slots=True)
class Load:
    """The flags that a sample is taken with; sizes in bytes."""

    operation: str
    block: int
    batch: int
    threads: int = 1

    @property
    def footprint(self) -> int:
        return self.block * self.batch * self.threads

    def flags(self) -> list[str]:
        return [
            f"--operation={self.operation}", f"--block_size={self.block}", f"--batch_size={self.batch}",
            f"--threads={self.threads}",
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one contender. CPU seconds are those of both sides."""

    bytes_per_second: float
    requests_per_second: float
    cpu_seconds_per_gb: float
    p50_us: float | None = None  # of a batch, where it is told
    p99_us: float | None = None
    failures: int = 0  # runs before this one that ended with an error

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


class Failed(Exception):
    """A contender could not be measured."""


def environment() -> dict[str, str]:
    """On loopback, and without a launcher's and the products' own variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith((*LAUNCHERS, "MC_", "MOONCAKE_HPC_"))}
    return {**kept, "MC_TCP_BIND_ADDRESS": "127.0.0.1", "PYTHONUNBUFFERED": "1"}


def cpu_of(pid: int, with_children: bool = False) -> float:
    """CPU seconds of a process so far, and of its ended children, to 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11 : 15 if with_children else 13]) / TICK


def run(command: list[str], timeout: float, env: dict[str, str] | None = None) -> tuple[str, float]:
    """Run to the end: its output and CPU seconds. Failed when it goes wrong."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=env or environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"none after {timeout:g} s"
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        text = output.read()
    if code != 0:
        raise Failed(f"exit code {code} of {' '.join(command)}:\n{text[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return text, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def tried_again(measure: Callable[[int], Sample]) -> Sample:
    """A sample by `measure`, which is told how often it failed before. Raises Failed after TRIES."""
    failures = 0
    while True:
        try:
            return measure(failures)
        except Failed:
            failures += 1
            if failures == TRIES:
                raise


class Target:
    """A running bench target of ours or the original's; a context manager."""

    def __init__(
        self,
        command: tuple[str, ...],
        flags: list[str],
        name: str,
        ready: Callable[[str], bool],
        env: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the target
        self._process = subprocess.Popen(
            [*command, "--mode=target", f"--local_server_name={name}", *flags],
            env=env or environment(), stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT
        while not ready(self._text()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = self._text()
                self.close()
                raise Failed(f"{' '.join(command)} --mode=target is not ready:\n{text[-2000:]}")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _text(self) -> str:
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stage:
    """An etcd and the targets, each started when first needed; a context manager that ends them all."""

    def __init__(self, original: str, buffer_size: int) -> None:
        """`original` is the path of the original's bench, "" where it is not to be had."""
        self._original, self._buffer_size = original, buffer_size
        self._build = ROOT
        self._stack = ExitStack()
        self._etcd = self._stack.enter_context(EmbeddedEtcd())
        self._targets: dict[str, Target] = {}
        self._nursery: Nursery | None = None
        self._numbers = itertools.count(12345)

    @property
    def metadata(self) -> str:
        return self._etcd.endpoint

    def of_build(self, build: Path) -> Stage:
        """This stage with the programs of another checkout of ours, which is set up; it ends with this one."""
        other = copy.copy(self)
        other._build = build.resolve()
        return other

    @property
    def environment(self) -> dict[str, str]:
        """What programs of this build are started with: each has a cache of kernels of its own."""
        other = self._build != ROOT
        return {name: value for name, value in environment().items() if not (other and name == "NUMBA_CACHE_DIR")}

    @property
    def our_bench(self) -> tuple[str, ...]:
        return (str(self._build / "launch" / "transfer_engine_bench"),)

    @property
    def original_bench(self) -> tuple[str, ...]:
        if not os.access(self._original, os.X_OK):
            raise Failed(f"no bench of the original at {self._original!r}: start through benchmarks/run")
        return (self._original, "--logtostderr")

    def cpu_seconds(self) -> float:
        """CPU seconds that the running targets, and what is forked, have used."""
        forked = cpu_of(self._nursery.pid, True) if self._nursery else 0.0
        return forked + sum(cpu_of(target.pid) for target in self._targets.values())

    @property
    def nursery(self) -> Nursery:
        """Where initiators are forked from that need not start; made when it is first asked for."""
        if self._nursery is None:
            from rdma_nursery import Nursery

            self._nursery = self._stack.enter_context(Nursery())
        return self._nursery

    def unused_name(self) -> str:
        return f"127.0.0.1:{next(self._numbers)}"

    def ours(self, protocol: str) -> Target:
        return self.target(f"{self._build}/{protocol}", self.our_bench, protocol)

    def original(self) -> Target:
        return self.target("original", self.original_bench, "tcp")

    def target(self, key: str, command: tuple[str, ...], protocol: str) -> Target:
        """The target of this key, started by `command` when it is first asked for."""
        if key not in self._targets:
            name = self.unused_name()

            def published(_: str) -> bool:
                with open_store(self.metadata) as store:
                    return '"addr"' in (store.get(f"mooncake/ram/{name}") or "")

            flags = [f"--metadata_server={self.metadata}", f"--protocol={protocol}"]
            flags += [f"--buffer_size={self._buffer_size}", "--threads=1"]
            self._targets[key] = self._stack.enter_context(Target(command, flags, name, published, self.environment))
        return self._targets[key]

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Contender(ABC):
    """Something that can be measured again and again."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    @abstractmethod
    def measure(self, load: Load, seconds: float) -> Sample:
        """Take a sample. Raises Failed."""

    def _initiate(self, command: tuple[str, ...], target: Target, load: Load, seconds: float, *more: str) -> _Run:
        words = [*command, "--mode=initiator", f"--metadata_server={self._stage.metadata}", *load.flags(), *more]
        words += [f"--segment_id={target.name}", f"--local_server_name={self._stage.unused_name()}"]
        words += [f"--buffer_size={load.footprint}", f"--duration={seconds:g}"]
        before = cpu_of(target.pid)
        text, cpu = self._run(words, seconds + EXTRA_TIMEOUT)
        if "FAILED" in text:
            raise Failed(f"{' '.join(words)}:\n{text[-2000:]}")
        return _Run(text, cpu, cpu_of(target.pid) - before)

    def _run(self, command: list[str], timeout: float) -> tuple[str, float]:
        """An initiator's output and CPU seconds. Raises Failed."""
        return run(command, timeout)


@dataclass(frozen=True, slots=True)
class _Run:
    text: str
    initiator_cpu: float
    target_cpu: float


class Ours(Contender):
    """Our initiator against our target, or against the original's; both of the stage's build."""

    def __init__(self, stage: Stage, protocol: str = "tcp", against_original: bool = False) -> None:
        super().__init__(stage)
        self._protocol, self._against_original = protocol, against_original

    def measure(self, load: Load, seconds: float) -> Sample:
        target = self._stage.original() if self._against_original else self._stage.ours(self._protocol)
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            flags = (f"--protocol={self._protocol}", f"--json={file.name}")
            done = self._initiate(self._stage.our_bench, target, load, seconds, *flags)
            told = json.loads(file.read())
        target_cpu = told["target_cpu_seconds"]
        cpu = told["initiator_cpu_seconds"] + (done.target_cpu if target_cpu is None else target_cpu)
        latency = told["batch_latency_us"]
        return Sample(
            told["bytes_per_second"], told["requests_per_second"], cpu / (told["bytes"] / 1e9),
            latency["p50"], latency["p99"],
        )  # fmt: skip

    def _run(self, command: list[str], timeout: float) -> tuple[str, float]:
        return run(command, timeout, self._stage.environment)


class Original(Contender):
    """The original's initiator against its own target, or against ours; not `pooled`, with a connection a request."""

    def __init__(self, stage: Stage, against_ours: bool = False, pooled: bool = True) -> None:
        super().__init__(stage)
        self._against_ours = against_ours
        self._variables = {} if pooled else {"MC_TCP_ENABLE_CONNECTION_POOL": "0"}

    def measure(self, load: Load, seconds: float) -> Sample:
        return tried_again(lambda failures: self._measure(load, seconds, failures))

    def _measure(self, load: Load, seconds: float, failures: int) -> Sample:
        whole = max(1, round(seconds))  # its --duration is an integer
        target = self._stage.ours("tcp") if self._against_ours else self._stage.original()
        done = self._initiate(self._stage.original_bench, target, load, whole, "--protocol=tcp")
        found = RESULT.search(done.text)
        if found is None or not int(found[2]):
            raise Failed(f"the original's bench reports nothing:\n{done.text[-2000:]}")
        requests = int(found[2]) * load.batch
        moved, elapsed = requests * load.block, float(found[1])
        cpu = done.initiator_cpu + done.target_cpu
        return Sample(moved / elapsed, requests / elapsed, cpu / (moved / 1e9), failures=failures)

    def _run(self, command: list[str], timeout: float) -> tuple[str, float]:
        return run(command, timeout, {**environment(), **self._variables})


class Raw(Contender):
    """A baseline of raw.py with calls of the block size, or of `call` bytes."""

    def __init__(self, stage: Stage, what: str, call: int = 0) -> None:
        super().__init__(stage)
        self._what, self._call = what, call

    def measure(self, load: Load, seconds: float) -> Sample:
        sizes = ["--footprint", load.footprint, "--call", self._call or load.block, "--seconds", seconds]
        command = [sys.executable, ROOT / "benchmarks" / "raw.py", self._what, *sizes]
        text, _ = run([str(word) for word in command], seconds + EXTRA_TIMEOUT)
        told = json.loads(text.splitlines()[-1])
        return Sample(told["bytes_per_second"], told["bytes_per_second"] / load.block, told["cpu_seconds_per_gb"])


class RawLatency(Contender):
    """A baseline of raw_latency.py."""

    def __init__(self, stage: Stage, what: str) -> None:
        super().__init__(stage)
        self._what = what

    def measure(self, load: Load, seconds: float) -> Sample:
        command = [sys.executable, str(ROOT / "benchmarks" / "raw_latency.py"), self._what]
        command += ["--call", str(load.block), "--seconds", str(seconds)]
        text, _ = run(command, seconds + EXTRA_TIMEOUT)
        told = json.loads(text.splitlines()[-1])
        moved = told["bytes_per_second"]
        return Sample(moved, told["requests_per_second"], told["cpu_seconds"] / (moved * seconds / 1e9))
