"""What is measured over RDMA: our bench and the original's on soft-RoCE devices, and perftest, the peer in C."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from contenders import Contender, Failed, Load, Sample, Stage, Target, environment, run, tried_again

OUR_BENCH = (sys.executable, "-m", "mooncake_hpc", "bench")
PERFTEST_LINE = re.compile(r"^\s*(\d+)\s+(\d+)\s+[\d.]+\s+[\d.]+\s+([\d.]+)\s*$", re.M)  # bytes, iterations, …, M/s
RESULT = re.compile(r"Test completed: duration ([\d.]+), batch count (\d+),")
OTHERS_PORTS = itertools.count(18600)
START_TIMEOUT = 30.0  # seconds for a server of perftest
RUN_TIMEOUT = 120.0


class Ours(Contender):
    """Our initiator on `senders` against our target on `receivers`, lists of devices with commas between."""

    command = OUR_BENCH
    name = "ours"

    def __init__(self, stage: Stage, senders: str = "rxe0", receivers: str = "rxe0", queue_pairs: int = 1) -> None:
        super().__init__(stage)
        self._senders, self._receivers, self._queue_pairs = senders, receivers, queue_pairs

    def measure(self, load: Load, seconds: float) -> Sample:
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            done = self._initiate(self._on(self._senders), self._target(), load, seconds, f"--json={file.name}")
            told = json.loads(file.read())
        if told["transports"] != ["rdma"]:
            raise Failed(f"carried by {told['transports']}")
        cpu = told["initiator_cpu_seconds"] + done.target_cpu
        latency = told["batch_latency_us"]
        return Sample(
            told["bytes_per_second"], told["requests_per_second"], cpu / (told["bytes"] / 1e9),
            latency["p50"], latency["p99"],
        )  # fmt: skip

    def _run(self, command: list[str], timeout: float) -> tuple[str, float]:
        variables = dict(word.split("=", 1) for word in self._variables())
        return self._stage.nursery.run(command[command.index("bench") :], variables, timeout)

    def _on(self, devices: str) -> tuple[str, ...]:
        return ("env", *self._variables(), *self.command, "--protocol=rdma", f"--device_name={devices}")

    def _variables(self) -> tuple[str, str]:
        return f"MC_NUM_QP_PER_EP={self._queue_pairs}", "MC_GID_INDEX=1"

    def _target(self) -> Target:
        key = f"{self.name}/{self._receivers}/{self._queue_pairs}"
        return self._stage.target(key, self._on(self._receivers), "rdma")


class Original(Ours):
    """The original's initiator against its own target."""

    name = "original"

    def __init__(self, stage: Stage, senders: str = "rxe0", receivers: str = "rxe0", queue_pairs: int = 2) -> None:
        super().__init__(stage, senders, receivers, queue_pairs)
        self.command = stage.original_bench

    def measure(self, load: Load, seconds: float) -> Sample:
        return tried_again(lambda failures: self._measure(load, seconds, failures))

    def _run(self, command: list[str], timeout: float) -> tuple[str, float]:
        return run(command, timeout)

    def _measure(self, load: Load, seconds: float, failures: int) -> Sample:
        whole = max(1, round(seconds))  # its --duration is an integer
        done = self._initiate(self._on(self._senders), self._target(), load, whole)
        found = RESULT.search(done.text)
        if found is None or not int(found[2]):
            raise Failed(f"the original's bench reports nothing:\n{done.text[-2000:]}")
        requests, elapsed = int(found[2]) * load.batch, float(found[1])
        moved = requests * load.block
        cpu = done.initiator_cpu + done.target_cpu
        return Sample(moved / elapsed, requests / elapsed, cpu / (moved / 1e9), failures=failures)


class Lane(Contender):
    """rdma_lane.py: our lane's loop without the bench, as many requests under way as the load's batch has."""

    def measure(self, load: Load, seconds: float) -> Sample:
        command = ["lane", load.operation, str(load.block), str(seconds), str(load.batch)]
        text, _ = self._stage.nursery.run(command, {}, RUN_TIMEOUT)
        told = json.loads(text.splitlines()[-1])
        return Sample(told["bytes_per_second"], told["requests_per_second"], told["cpu_seconds_per_gb"])


class Registration(Contender):
    """rdma_registration.py: a block of memory for as many devices as the load's batch has."""

    def __init__(self, stage: Stage, way: str) -> None:
        super().__init__(stage)
        self._way = way

    def measure(self, load: Load, seconds: float) -> Sample:
        command = ["registration", self._way, str(load.block), str(seconds), str(load.batch)]
        text, _ = self._stage.nursery.run(command, {}, RUN_TIMEOUT)
        told = json.loads(text.splitlines()[-1])
        return Sample(told["bytes_per_second"], told["requests_per_second"], told["cpu_seconds_per_gb"])


class Perftest(Contender):
    """`ib_write_bw` or `ib_read_bw`, one queue pair, as many requests under way as the load's batch has.

    For a number of iterations that fills the time: where it is told a duration it counts in whole rounds of its depth,
    which for large blocks are a third of a second long.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._rate = 0.0  # requests a second, of a first run

    def measure(self, load: Load, seconds: float) -> Sample:
        if not self._rate:
            self._rate = self._measure(load, "-D", max(1, round(seconds)), "-f", 0).requests_per_second
        rounds = max(4, math.ceil(1.3 * seconds * self._rate / load.batch))
        return self._measure(load, "-n", rounds * load.batch)

    def _measure(self, load: Load, *length: object) -> Sample:
        program, port = f"ib_{load.operation}_bw", next(OTHERS_PORTS)
        moderation = min(16, load.batch)
        words = [program, "-d", "rxe0", "-x", "1", "-F", "-q", "1", "-s", str(load.block), "-t", str(load.batch)]
        words += ["-Q", str(moderation), "-p", str(port), *map(str, length)]
        words += ["-o", "16"] if load.operation == "read" else []
        with _server(words, port):
            text, cpu = run([*words, "127.0.0.1"], RUN_TIMEOUT)
        found = PERFTEST_LINE.search(text)
        if found is None:
            raise Failed(f"{' '.join(words)} reports nothing:\n{text[-2000:]}")
        rate = float(found[3]) * 1e6
        return Sample(rate * load.block, rate, cpu / (int(found[1]) * int(found[2]) / 1e9))


@contextmanager
def _server(words: Sequence[str], port: int) -> Iterator[None]:
    """perftest's other side, from when it listens until it has ended."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while not _listening(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise Failed(f"{' '.join(words)} does not listen:\n{output.read()}")
                time.sleep(0.02)
            yield
            process.wait(START_TIMEOUT)
        finally:
            process.kill()
            process.wait()


def _listening(port: int) -> bool:
    """Whether anybody listens on the TCP port: perftest's own words stay in its buffer."""
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    return any(re.search(rf":{port:04X} [0-9A-F]+:0000 0A ", table) for table in tables)


class Limited(Ours):
    """Ours while each sender's link is limited."""

    RATE = ("rate", "160mbit", "burst", "64kb", "limit", "4mb")

    def measure(self, load: Load, seconds: float) -> Sample:
        links = [f"roce{device[3:]}" for device in self._senders.split(",")]
        for link in links:
            _tc("add", link, "root", "tbf", *self.RATE)
        try:
            return super().measure(load, seconds)
        finally:
            for link in links:
                _tc("del", link, "root")


def _tc(verb: str, link: str, *words: str) -> None:
    done = subprocess.run(["tc", "qdisc", verb, "dev", link, *words], text=True, capture_output=True)
    if done.returncode:
        raise Failed(f"tc qdisc {verb} dev {link}: {done.stderr}")
