"""The bandwidth between every two ranks of a job, in both directions: finds the slow link, NIC or node.

Every rank publishes buffers and addresses every other rank in turn. One pair at a time has the network to itself;
with `at_once`, disjoint pairs run together, which is quicker and shows what links share.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from mooncake_hpc.bench.job import Output, open_engine, worker_pool
from mooncake_hpc.bench.node import Initiator, Result, Target
from mooncake_hpc.bench.plan import BenchConfig
from mooncake_hpc.bench.report import Units, configuration_lines, figures, machine, throughput, write_json
from mooncake_hpc.bench.runner import longest_run
from mooncake_hpc.core.errors import ConfigError, MooncakeError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.jobs.job_etcd import job_metadata
from mooncake_hpc.jobs.mpi import Launch, World, default_name

SCHEMA = 2
Pair = tuple[int, int]  # initiator, target


def rounds(size: int, at_once: bool) -> list[list[Pair]]:
    """All ordered pairs of `size` ranks, each once; the pairs of a round have no rank in common.

    At once: the circle method of round-robin tournaments, size - 1 rounds (size, where that is odd) a direction.
    """
    if not at_once:
        return [[(a, b)] for a in range(size) for b in range(size) if a != b]
    count = size + size % 2  # with an odd number, whoever meets the last one rests
    result = []
    for turn in range(count - 1):
        circle = [0, *((turn + i) % (count - 1) + 1 for i in range(count - 1))]
        pairs = [(circle[i], circle[-1 - i]) for i in range(count // 2)]
        pairs = [(a, b) for a, b in pairs if max(a, b) < size]
        result += [pairs, [(b, a) for a, b in pairs]]
    return result


@dataclass(frozen=True, slots=True)
class Matrix:
    """The result: names and hosts by rank, and a Result for each ordered pair. Every pair is there."""

    config: BenchConfig
    names: Sequence[str]
    hosts: Sequence[str]
    pairs: dict[Pair, Result]

    def __post_init__(self) -> None:
        missing = {(a, b) for a in range(self.size) for b in range(self.size) if a != b} - set(self.pairs)
        if missing:
            raise MooncakeError(f"a matrix without the pairs {sorted(missing)[:8]}")

    @property
    def size(self) -> int:
        return len(self.names)

    def rate(self, pair: Pair) -> float:
        """Bytes a second."""
        return throughput(self.config, self.pairs[pair].measured)

    @property
    def wrong(self) -> int:
        """Bytes that were not what they should be, with --verify."""
        return sum(result.measured.wrong for result in self.pairs.values())

    def lines(self, units: Units) -> list[str]:
        """A row an initiator, a column a target; the slowest pair by name."""
        cells = [["", *(str(b) for b in range(self.size)), ""]]
        for a in range(self.size):
            row = [
                "-" if a == b else units.format(self.rate((a, b))).removesuffix(f" {units.unit}/s")
                for b in range(self.size)
            ]
            cells.append([str(a), *row, self.names[a]])
        widths = [max(len(row[i]) for row in cells) for i in range(self.size + 1)]
        table = [
            "  ".join(text.rjust(w) for text, w in zip(row, widths, strict=False)) + f"  {row[-1]}" for row in cells
        ]
        rates = {pair: self.rate(pair) for pair in self.pairs}
        (low, a, b), high = min((rate, a, b) for (a, b), rate in rates.items()), max(rates.values())
        return [
            f"{units.unit}/s, {self.config.operation}s; rows address columns".rstrip(),
            *(line.rstrip() for line in table),
            f"median {units.format(statistics.median(rates.values()))}, fastest {units.format(high)}, slowest "
            f"{units.format(low)}: rank {a} on {self.hosts[a]} addressing rank {b} on {self.hosts[b]}",
        ]

    def as_json(self) -> dict[str, Any]:
        """Base units: bytes, seconds, µs for latencies. `bytes_per_second[a][b]`: rank a addresses rank b."""
        return {
            "schema": SCHEMA,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "config": self.config.as_dict(),
            "machine": machine(),
            "ranks": [{"name": n, "host": h} for n, h in zip(self.names, self.hosts, strict=True)],
            "bytes_per_second": [
                [None if a == b else self.rate((a, b)) for b in range(self.size)] for a in range(self.size)
            ],
            "wrong_bytes": self.wrong,
            "pairs": [
                {
                    "initiator": a, "target": b, "transports": result.transports,
                    **figures(self.config, result.measured),
                }
                for (a, b), result in sorted(self.pairs.items())
            ],
        }  # fmt: skip


def run_ranks(
    config: BenchConfig, at_once: bool, settings: Settings, launch: Launch, world: World, output: Output
) -> int:
    """One rank's part of the job; rank 0 reports. The exit code of this rank: 1 where bytes were wrong."""
    if world.size < 2:
        raise ConfigError("a matrix needs at least 2 ranks")
    wait = config.timeout + settings.settle_timeout
    turn = wait + longest_run(config) + config.batch_timeout * (1 + config.warmup)
    code = 0
    with ExitStack() as stack:
        metadata, settings = job_metadata(config.metadata_server, settings, world, stack, wait)
        config = replace(config, mode="by rank", local_server_name=config.local_server_name or default_name(launch))
        with open_engine(config, metadata, settings) as engine, worker_pool(config) as pool:
            Target(engine, config)  # one region: a target serves one pair at a time
            names = world.allgather(engine.name, wait, "targets publish their buffers")
            if world.rank == 0:
                for line in [*configuration_lines(config), f"ranks={world.size}"]:
                    output.say(line)
            mine: dict[Pair, Result] = {}
            for pairs in rounds(world.size, at_once):
                world.barrier(turn, f"a round ends, before {_words(pairs, names)}")
                for pair in pairs:
                    if pair[0] == world.rank:
                        with world.suspecting(engine, names):
                            mine[pair] = _measure(config, engine, pool, names[pair[1]])
            world.barrier(turn, "the last round ends")
            ends = world.gather((world.host.name, mine), wait, "results")
        if world.rank == 0:
            whole = {pair: result for _, part in ends for pair, result in part.items()}
            code = _report(Matrix(config, names, [host for host, _ in ends], whole), output)
        world.barrier(wait, "all ranks withdraw their keys")  # before rank 0 ends an embedded etcd
    return code


def _words(pairs: Sequence[Pair], names: Sequence[str]) -> str:
    return ", ".join(f"{names[a]} addresses {names[b]}" for a, b in pairs[:4])


def _measure(config: BenchConfig, engine: Any, pool: Any, target: str) -> Result:
    """One pair. MooncakeError where a transfer fails: ends the job, as a matrix with a hole would look complete."""
    with Initiator(engine, config, [target], [0]) as initiator:
        initiator.warm_up(pool)
        result = initiator.run(pool)
    if result.measured.failure:
        raise MooncakeError(f"{engine.name} addressing {target}: {result.measured.failure}")
    result.transports = [engine.open_segment(target).transport]  # not those of earlier pairs
    return result


def _report(matrix: Matrix, output: Output) -> int:
    for line in matrix.lines(output.units):
        output.say(line)
    if output.json:
        write_json(output.json, matrix.as_json())
    output.say(f"Matrix completed: {len(matrix.pairs)} pairs, {matrix.wrong} wrong bytes")
    return 1 if matrix.wrong else 0
