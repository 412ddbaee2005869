"""Start-up at scale, a rank: files opened, time to the first transfer, requests to etcd at first and afterwards."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from mooncake_hpc import EmbeddedEtcd

RANK = Path(__file__).with_name("startup_rank.py")
TIMEOUT = 300.0  # seconds for a job
COUNTER = "grpc_server_msg_received_total{"  # etcd's count of messages, requests in streams among them, by method


def messages(endpoint: str) -> dict[str, int]:
    """Messages that etcd has received, by method; those of zero are left out."""
    host, _, port = endpoint.rpartition(":")
    connection = HTTPConnection(host, int(port), timeout=30)
    connection.request("GET", "/metrics")
    counts = {}
    for line in connection.getresponse().read().decode().splitlines():
        if line.startswith(COUNTER) and (count := int(float(line.split()[-1]))):
            counts[line.partition('grpc_method="')[2].partition('"')[0]] = count
    connection.close()
    return counts


def difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}


def job(ranks: int, mpirun: str, seconds: float) -> dict[str, Any]:
    """Run `ranks` ranks; figures a rank. Raises RuntimeError with what a failed job printed."""
    with EmbeddedEtcd() as etcd:
        before = messages(etcd.endpoint)
        launch = [sys.executable, "-m", "mooncake_hpc", "launch", f"--mpirun={mpirun}", f"--ranks={ranks}", "--"]
        words = [sys.executable, str(RANK), etcd.endpoint, str(seconds)]
        result = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=TIMEOUT)
        if result.returncode:
            raise RuntimeError(f"{ranks} ranks: exit code {result.returncode}\n{result.stdout}{result.stderr}")
    told = json.loads(result.stdout.splitlines()[-1])
    rows = told["ranks"]
    start = difference(told["started"], before)
    steady = difference(told["steady"], told["started"])
    return {
        "ranks": ranks,
        "files": max(row["files"] for row in rows),
        "libraries": max(row["libraries"] for row in rows),
        "first_transfer_median": statistics.median(row["seconds"] for row in rows),
        "first_transfer_last": max(row["seconds"] for row in rows),
        "compiled": sum(row["compiled"] for row in rows),
        "start": {name: count / ranks for name, count in start.items()},
        "steady": {name: count / ranks / seconds for name, count in steady.items()},
    }


def lines(figures: list[dict[str, Any]]) -> list[str]:
    """The table, and the requests by method."""
    head = ("ranks", "files", "libraries", "first transfer, s", "the last, s", "compiled", "etcd: start", "a second")
    result = ["figures of one rank, but for the kernels compiled by all of them:", "  ".join(head)]
    for row in figures:
        values = (
            f"{row['ranks']}", f"{row['files']}", f"{row['libraries']}", f"{row['first_transfer_median']:.2f}",
            f"{row['first_transfer_last']:.2f}", f"{row['compiled']:.0f}", f"{sum(row['start'].values()):.1f}",
            f"{sum(row['steady'].values()):.2f}",
        )  # fmt: skip
        result.append("  ".join(value.rjust(len(name)) for name, value in zip(head, values, strict=True)))
    for row in figures:
        for when in ("start", "steady"):
            methods = ", ".join(f"{name} {count:.2f}" for name, count in sorted(row[when].items()))
            result.append(f"{row['ranks']} ranks, {when}: {methods or 'none'}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/startup", description=__doc__)
    parser.add_argument("--mpirun", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", default="2,4,8,16", help="numbers of ranks [2,4,8,16]")
    parser.add_argument("--seconds", type=float, default=20.0, help="of steady transfers [20]")
    parser.add_argument("--json", help="a file for the figures")
    options = parser.parse_args()
    figures = [job(int(ranks), options.mpirun, options.seconds) for ranks in options.ranks.split(",")]
    print("\n".join(lines(figures)))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
