"""The samples of a round of the fan-out benchmark, and what is to be reached."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from contenders import ROOT, Load, Ours, Raw, Stage, run
from load import Calm
from p2p_hosts import Answer, Fleet, Hosts, soon

MIB = 1 << 20
NAME, SEED = "model", 11
TURNS = 5  # pulls of one reader over tcp, each with a run of the bench after it
BENCH_SECONDS = 0.8  # of the bench beside a pull, which takes about as long
BENCH_BYTES = 1 << 30  # that the bench reads again and again: many times what caches hold, as the object
MPI_TIMEOUT = 120.0
VIRTUAL_SHELL = str(ROOT / "launch" / "virtual-shell")


@dataclass(frozen=True, slots=True)
class Sample:
    """One fan-out, or what stands beside it. `rate`: payload bytes a second of all receivers together; CPU seconds of
    all processes; `seeded`: objects that the first holder sent; `least_served`: shards, by the reader that served
    least."""

    seconds: float
    rate: float
    cpu: float = 0.0
    seeded: float = 0.0
    least_served: float = 0.0
    grown: int = 0  # bytes of memory beside the object, of the reader that grew most

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


Round = dict[str, Sample]
Limited = dict[str, Callable[["Links", Round], Sample]]


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure made within a round."""

    what: str
    figure: Callable[[Round], float]
    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def text(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


def ratio(above: str, below: str) -> Callable[[Round], float]:
    return lambda seen: seen[above].seconds / seen[below].seconds


def _done(fleet: Fleet, numbers: Sequence[int]) -> None:
    """Once all have pulled: compare the bytes, and let go of the object."""
    fleet.all(numbers, "check", seed=SEED)
    fleet.all(numbers, "drop", name=NAME)


class Links:
    """Hosts behind limited links: node 0 holds the object, the others pull."""

    def __init__(self, fleet: Fleet, hosts: Hosts, size: int, shard_size: int) -> None:
        self._fleet, self._hosts, self.size, self._shard_size = fleet, hosts, size, shard_size
        told = fleet.nodes[0].do("register", name=NAME, size=size, seed=SEED, shard_size=shard_size)
        self._address = told["address"]
        fleet.all(range(1, hosts.number), "prepare", size=size)

    def pull(self, readers: int) -> Sample:
        """All start together."""
        numbers = range(1, 1 + readers)
        self._fleet.all(numbers, "prepare", size=self.size)
        before = self._fleet.cpu_seconds()
        at = soon()
        answers = self._fleet.all(numbers, "pull", name=NAME, at=at)
        sample = self._sample(answers, before)
        _done(self._fleet, numbers)
        return sample

    def late(self, readers: int, after: float) -> Sample:
        """One more joins `after` seconds: its own time."""
        numbers = range(1, 1 + readers)
        late = 1 + readers
        self._fleet.all([*numbers, late], "prepare", size=self.size)
        before = self._fleet.cpu_seconds()
        at = soon()
        for number in numbers:
            self._fleet.nodes[number].send(do="pull", name=NAME, at=at)
        self._fleet.nodes[late].send(do="pull", name=NAME, at=at + after)
        answers = [self._fleet.nodes[number].answer() for number in [*numbers, late]]
        sample = self._sample(answers[-1:], before)
        _done(self._fleet, [*numbers, late])
        return sample

    def star(self, readers: int) -> Sample:
        """The original's algorithm through our engine."""
        numbers = range(1, 1 + readers)
        self._fleet.all(numbers, "prepare", size=self.size)
        before = self._fleet.cpu_seconds()
        order = {"source": self._fleet.name(0), "address": self._address, "shard_size": self._shard_size}
        sample = self._sample(self._fleet.all(numbers, "star", at=soon(), **order), before, readers)
        self._fleet.all(numbers, "check", seed=SEED)
        return sample

    def mpi(self, seen: dict[str, Sample], what: str) -> Sample:
        """Both MPI cases in one job, so that no rank polls while others are measured."""
        if what in seen:
            return seen[what]
        told, cpu = run_mpi(self._hosts, self.size)
        receivers = self._hosts.number - 1
        for name in ("broadcast", "chain"):
            seen[name] = Sample(told[name], receivers * self.size / told[name], cpu / 2, 1.0)
        return seen[what]

    def _sample(self, answers: Sequence[Answer], cpu_before: float, seeded: float | None = None) -> Sample:
        served = dict.fromkeys([self._fleet.name(1 + number) for number in range(len(answers))], 0)
        for answer in answers:
            for source, nbytes in answer.get("sources", {}).items():
                served[source] = served.get(source, 0) + nbytes
        from_seed = served.pop(self._fleet.name(0), 0) / self.size if seeded is None else seeded
        slowest = max(answer["seconds"] for answer in answers)
        return Sample(
            slowest,
            len(answers) * self.size / slowest,
            self._fleet.cpu_seconds() - cpu_before,
            from_seed,
            min(served.values(), default=0) / self._shard_size,
            max(answer.get("grown", 0) for answer in answers),
        )


def run_mpi(hosts: Hosts, size: int) -> tuple[Answer, float]:
    """A job of one rank a host. Its answer and CPU seconds."""
    names = ",".join(f"h{number}" for number in range(hosts.number))
    mpirun = [str(ROOT / ".venv" / "bin" / "mpirun"), "-launcher", "ssh", "-launcher-exec", VIRTUAL_SHELL]
    mpirun += ["-hosts", names, "-ppn", "1", "-n", str(hosts.number)]
    program = [sys.executable, str(ROOT / "benchmarks" / "p2p_mpi.py"), f"--size={size}"]
    output, cpu = run(hosts.on("h0", *mpirun, *program), MPI_TIMEOUT, hosts.env)
    return json.loads(output.splitlines()[-1]), cpu


LINKS: Limited = {
    "N=1": lambda links, _: links.pull(1),
    "N=2": lambda links, _: links.pull(2),
    "N=4": lambda links, _: links.pull(4),
    "N=8": lambda links, _: links.pull(8),
    "late": lambda links, seen: links.late(4, seen["N=1"].seconds / 2),
    "broadcast": lambda links, seen: links.mpi(seen, "broadcast"),
    "chain": lambda links, seen: links.mpi(seen, "chain"),
    "star N=1": lambda links, _: links.star(1),
    "star N=8": lambda links, _: links.star(8),
}
NEEDS = {"late": ("N=1",)}  # samples that others are made from


def bound(readers: int, shards: int) -> float:
    """No fan-out over equal links is faster than so many times one reader alone."""
    return 1 + math.floor(math.log2(readers)) / shards


LINK_GOALS = (
    Goal("N=2 / N=1", ratio("N=2", "N=1"), 1.10),
    Goal("N=4 / N=1", ratio("N=4", "N=1"), 1.15),
    Goal("N=8 / N=1", ratio("N=8", "N=1"), 1.25),
    Goal("star / ours, N=1", lambda seen: abs(ratio("star N=1", "N=1")(seen) - 1), 0.03),
    Goal("star / ours, N=8", ratio("star N=8", "N=8"), 6, at_least=True),
    Goal("MPI_Bcast / ours, N=8", ratio("broadcast", "N=8"), 1.4, at_least=True),
    Goal("ours / chain in mpi4py, N=8", ratio("N=8", "chain"), 1.25),
    Goal("objects sent by the seed, N=8", lambda seen: seen["N=8"].seeded, 2.5),
    Goal("shards served by the least serving reader, N=8", lambda seen: seen["N=8"].least_served, 1, at_least=True),
    Goal("a reader joining at half / N=1", ratio("late", "N=1"), 1.15),
    Goal("MiB of memory beside the object, N=8", lambda seen: seen["N=8"].grown / MIB, 64),
)


def one_reader_tcp(stage: Stage, size: int, calm: Calm) -> tuple[Sample, Sample]:
    """One reader over loopback, no limit: the whole object, verified, into touched memory; and the bench at 1 MiB
    blocks for about as long. In turn, the best of TURNS, as the first pull warms up."""
    bench, load = Ours(stage), Load("read", MIB, BENCH_BYTES // MIB)

    def pull() -> Sample:
        fleet.nodes[1].do("prepare", size=size)
        answer = fleet.nodes[1].do("pull", name=NAME, at=soon())
        _done(fleet, [1])
        return Sample(answer["seconds"], size / answer["seconds"], answer["cpu"], 1.0, 0, answer["grown"])

    with Fleet(2, None, "tcp") as fleet:
        fleet.nodes[0].do("register", name=NAME, size=size, seed=SEED)
        pulls, rates = [], []
        for _ in range(TURNS):
            pulls.append(calm.sample(pull))
            rates.append(calm.sample(lambda: bench.measure(load, BENCH_SECONDS)).bytes_per_second)
    rate = max(rates)
    return min(pulls, key=lambda sample: sample.seconds), Sample(size / rate, rate)


def bare_loop(stage: Stage, size: int) -> Sample:
    """What one reader does at the least: a bare loop that receives and hashes, over as much memory as the bench."""
    told = Raw(stage, "hashed").measure(Load("read", MIB, BENCH_BYTES // MIB), 1.0)
    return Sample(size / told.bytes_per_second, told.bytes_per_second)


def readers_of_one_host(readers: int, size: int) -> tuple[Sample, Sample]:
    """All readers pull through shared memory; then as many processes copy as much, np.copyto. The best of three."""
    numbers = range(1, 1 + readers)
    with Fleet(1 + readers, None, "auto") as fleet:
        fleet.nodes[0].do("register", name=NAME, size=size, seed=SEED)
        fleet.all(numbers, "prepare", size=size)
        fleet.all(numbers, "prepare_copy")
        pulls, copies = [], []
        for _ in range(3):
            fleet.all(numbers, "prepare", size=size)
            answers = fleet.all(numbers, "pull", name=NAME, at=soon())
            _done(fleet, numbers)
            pulls.append(max(answer["seconds"] for answer in answers))
            copies.append(max(answer["seconds"] for answer in fleet.all(numbers, "copy", at=soon())))
    pull, copy = min(pulls), min(copies)
    return Sample(pull, readers * size / pull), Sample(copy, readers * size / copy)
