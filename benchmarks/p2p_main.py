"""The fan-out benchmark: rounds over limited links, then the two cases without a limit; JSON and Markdown."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contenders import Failed, Stage
from load import Calm, Watch
from p2p_cases import BENCH_BYTES, LINKS, MIB, NEEDS, Links, Round, bare_loop, one_reader_tcp, readers_of_one_host
from p2p_hosts import Fleet, Hosts
from p2p_metadata import measure
from p2p_report import Results

RESULTS = Path(__file__).resolve().parent / "results"
READERS = 8

Tell = Callable[[str], None]


def limited(options: argparse.Namespace, results: Results, tell: Tell) -> None:
    """Rounds over hosts with limited links."""
    chosen = [name for name in LINKS if not options.only or name in options.only or needed(name, options.only)]
    with Hosts(1 + READERS, options.rate) as hosts, Fleet(1 + READERS, hosts, "tcp") as fleet:
        links = Links(fleet, hosts, options.size * MIB, options.shard * MIB)
        links.pull(READERS)  # connections
        calm = Calm(0.15, options.calm, tell)
        for number in range(options.rounds):
            calm.wait()
            watch = Watch(lambda: fleet.cpu_seconds() + sum(os.times()[:4]), interrupts=False)
            seen: Round = {}
            for name in chosen:
                seen[name] = LINKS[name](links, seen)
                tell(f"round {number + 1} of {options.rounds}: {name} {seen[name].seconds:.3f} s, "
                     f"{seen[name].cpu:.2f} CPU s, {seen[name].seeded:.2f} objects from the seed")  # fmt: skip
            results.links.append(seen)
            results.others.append(watch.others())


def needed(name: str, only: Sequence[str]) -> bool:
    return any(name in NEEDS.get(other, ()) for other in only)


def unlimited(options: argparse.Namespace, results: Results, tell: Tell) -> None:
    """Rounds of one reader over tcp, and of eight on one host."""
    size, alone = options.large * MIB, options.alone * MIB
    with Stage("", BENCH_BYTES) as stage:
        calm = Calm(0.15, options.calm, tell)
        for number in range(options.rounds):
            calm.wait()
            seen: Round = {}
            seen["tcp"], seen["bench"] = one_reader_tcp(stage, alone, calm)
            seen["bare loop, hashed"] = calm.sample(lambda: bare_loop(stage, alone))
            seen["shm"], seen["copyto"] = readers_of_one_host(READERS, size)
            results.host.append(seen)
            results.again = calm.again
            told = ", ".join(f"{name} {sample.rate / 1e9:.2f} GB/s" for name, sample in seen.items())
            tell(f"round {number + 1} of {options.rounds}: {told}")


def metadata(options: argparse.Namespace, results: Results, tell: Tell) -> None:
    """1 TiB of 64 MiB shards."""
    for holders in (8, 64):
        results.metadata.append(measure(1 << 40, 64 * MIB, holders, options.metadata_seconds))
        tell(f"metadata, {holders} holders: {results.metadata[-1].writes:.1f} writes a second")


PARTS = {"limited": limited, "unlimited": unlimited, "metadata": metadata}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/p2p",
        description="Measures the P2P Store's fan-out on virtual hosts with limited links, beside a star, MPI_Bcast "
        "and a chain in mpi4py, then without limits; writes p2p.json and p2p.md. Root only. Exit code: 0, whatever was "
        "reached; 1 when something failed.",
    )
    parser.add_argument("only", nargs="*", help=f"samples to take over limited links: {', '.join(LINKS)} [all]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--rate", default="200mbit", help="of each link [%(default)s]")
    parser.add_argument("--size", type=int, default=64, help="MiB of the object over limited links [%(default)s]")
    parser.add_argument("--shard", type=int, default=1, help="MiB of its shards [%(default)s]")
    parser.add_argument("--alone", type=int, default=4096, help="MiB of what one reader pulls over tcp [%(default)s]")
    parser.add_argument("--large", type=int, default=1024, help="MiB of what readers of a host pull [%(default)s]")
    parser.add_argument("--part", choices=("all", *PARTS), default="all", help="[%(default)s]")
    parser.add_argument("--metadata-seconds", type=float, default=10.0, help="of announcements [%(default)s]")
    calm_help = (
        "before each round wait at most this long for others to leave the machine alone; of one reader over tcp take "
        "samples again, no longer than this each, in which the host moved the cores [%(default)s]"
    )
    parser.add_argument("--calm", type=float, default=0.0, metavar="SECONDS", help=calm_help)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="[benchmarks/results]")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - LINKS.keys():
        parser.error(f"no such sample: {', '.join(sorted(unknown))}; there are {', '.join(LINKS)}")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    shown: dict[str, Any] = {name: value for name, value in vars(options).items() if name != "output"}
    results = Results({**shown, "load_average": os.getloadavg()[0]})
    begin = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} {text}", file=sys.stderr, flush=True)

    try:
        for name, part in PARTS.items():
            if options.part in ("all", name):
                part(options, results, tell)
    except Failed as error:
        results.failure = str(error)
    except KeyboardInterrupt:
        results.failure = "interrupted"
    results.seconds = round(time.monotonic() - begin, 1)
    results.write(options.output)
    print(results.markdown())
    return 1 if results.failure else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
