"""What a bench prints and writes: the configuration, a table, the original's closing line, and JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mooncake_hpc.bench.node import Result
from mooncake_hpc.bench.plan import BenchConfig
from mooncake_hpc.bench.runner import Measured
from mooncake_hpc.bench.statistics import Histogram
from mooncake_hpc.core.errors import ConfigError

SCHEMA = 2
UNITS = {  # the original's --report_unit: bytes in one
    "GB": 1e9, "GiB": 2.0**30, "Gb": 1e9 / 8, "MB": 1e6, "MiB": 2.0**20, "Mb": 1e6 / 8,
    "KB": 1e3, "KiB": 2.0**10, "Kb": 1e3 / 8,
}  # fmt: skip
COLUMNS = ("", "op/s", "p50", "p90", "p99", "p99.9", "max", "CPU s/GB", "errors", "wrong")


@dataclass(frozen=True, slots=True)
class Units:
    """How throughput is printed."""

    unit: str = "GB"
    precision: int = 2

    def format(self, bytes_per_second: float) -> str:
        return f"{bytes_per_second / UNITS[self.unit]:.{self.precision}f} {self.unit}/s"


def throughput(config: BenchConfig, measured: Measured) -> float:
    """Payload bytes a second inside the timed windows."""
    return measured.batches * config.batch_bytes / measured.seconds if measured.seconds else 0.0


def total(results: Sequence[Result]) -> Measured:
    """The sum over initiators that ran at the same time: the longest time, all batches, added histograms."""
    latency, request_latency = Histogram(), Histogram()
    for result in results:
        latency.merge(result.measured.latency)
        request_latency.merge(result.measured.request_latency)
    parts = [result.measured for result in results]
    return Measured(
        seconds=max(p.seconds for p in parts),
        cpu_seconds=sum(p.cpu_seconds for p in parts),
        batches=sum(p.batches for p in parts),
        errors=sum(p.errors for p in parts),
        failure=next((p.failure for p in parts if p.failure), ""),
        latency=latency,
        request_latency=request_latency,
        compared=sum(p.compared for p in parts),
        wrong=sum(p.wrong for p in parts),
    )


def configuration_lines(config: BenchConfig) -> list[str]:
    """The whole configuration, before the run."""
    words = [f"{name}={value}" for name, value in config.as_dict().items() if value not in ("", False)]
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > 100:
            lines.append(line)
            line = ""
        line += f"{' ' if line else ''}{word}"
    return [*lines, line]


def report_lines(config: BenchConfig, results: Sequence[Result], targets_cpu: float | None, units: Units) -> list[str]:
    """The table (a row an initiator, and the sum of several), transports, lanes and CPU, without the last line."""
    rows = [[f"{r.name} -> {' '.join(r.targets)}", *_cells(config, r.measured, units)] for r in results]
    whole = total(results)
    if len(results) > 1:
        rows.append(["sum", *_cells(config, whole, units)])
    lines = _table([COLUMNS[0], "throughput", *COLUMNS[1:]], rows)
    lines.append(f"µs a batch above; a request, from the submission of its batch: {_latency(whole.request_latency)}")
    lanes: dict[str, int] = {}
    for result in results:
        for name, count in result.lane_bytes.items():
            lanes[name] = lanes.get(name, 0) + count
    transports = sorted({name for r in results for name in r.transports})
    lines.append(
        f"carried by {', '.join(transports) or 'nothing'}: "
        + ", ".join(f"{name} {count / 1e9:.3f} GB" for name, count in sorted(lanes.items()))
    )
    lines.append(_cpu_line(config, results, whole.cpu_seconds, targets_cpu))
    if config.verify:
        lines.append(f"verified: {whole.compared} bytes compared, {whole.wrong} wrong")
    if whole.failure:
        lines.append(f"FAILED: {whole.failure}")
    return lines


def _cpu_line(config: BenchConfig, results: Sequence[Result], initiators: float, targets: float | None) -> str:
    if {target for result in results for target in result.targets} <= {result.name for result in results}:
        return f"CPU: {initiators:.2f} s, of ranks that are initiator and target at once"
    if targets is not None:
        return f"CPU: initiators {initiators:.2f} s, targets {targets:.2f} s"
    return f"CPU: initiators {initiators:.2f} s, targets {'not measured with --verify' if config.verify else 'unknown'}"


def final_line(config: BenchConfig, measured: Measured, units: Units) -> str:
    """The original's closing line, word for word."""
    rate = units.format(throughput(config, measured))
    return f"Test completed: duration {measured.seconds:.2f}, batch count {measured.batches}, throughput {rate}"


def json_object(config: BenchConfig, results: Sequence[Result], targets_cpu: float | None) -> dict[str, Any]:
    """Everything, in base units: bytes, seconds, and µs for latencies. `schema` changes when a meaning does."""
    whole = total(results)
    return {
        "schema": SCHEMA,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": config.as_dict(),
        "machine": machine(),
        "initiators": [
            {
                "name": r.name, "rank": r.rank, "host": r.host, "pid": r.pid, "targets": r.targets,
                "transports": r.transports, "lane_bytes": r.lane_bytes, **figures(config, r.measured),
            }
            for r in results
        ],
        "transports": sorted({name for r in results for name in r.transports}),
        "target_cpu_seconds": targets_cpu,
        **figures(config, whole),
    }  # fmt: skip


def write_json(path: str, value: dict[str, Any]) -> None:
    """Append one line. ConfigError when the file cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(value, sort_keys=True) + "\n")
    except OSError as error:
        raise ConfigError(f"--json={path} cannot be written: {error}") from error


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    cpu = ""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith(("model name", "Model")):
            cpu = line.partition(":")[2].strip()
            break
    try:
        version = metadata.version("mooncake-hpc")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return {
        "host": platform.node(),
        "kernel": platform.release(),
        "arch": platform.machine(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "python": sys.version.split()[0],
        "mooncake_hpc": version,
    }


def _lines(path: str) -> Iterable[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return ()


def figures(config: BenchConfig, measured: Measured) -> dict[str, Any]:
    """What an initiator measured, in base units."""
    return {
        "seconds": measured.seconds,
        "batches": measured.batches,
        "requests": measured.batches * config.batch_size,
        "bytes": measured.batches * config.batch_bytes,
        "bytes_per_second": throughput(config, measured),
        "requests_per_second": _rate(config, measured),
        "batch_latency_us": measured.latency.summary(),
        "request_latency_us": measured.request_latency.summary(),
        "initiator_cpu_seconds": measured.cpu_seconds,
        "errors": measured.errors,
        "failure": measured.failure,
        "compared_bytes": measured.compared,
        "wrong_bytes": measured.wrong,
    }


def _rate(config: BenchConfig, measured: Measured) -> float:
    return measured.batches * config.batch_size / measured.seconds if measured.seconds else 0.0


def _cells(config: BenchConfig, measured: Measured, units: Units) -> list[str]:
    latency = measured.latency.summary()
    moved = measured.batches * config.batch_bytes / 1e9
    return [
        units.format(throughput(config, measured)),
        f"{_rate(config, measured):.0f}",
        *(f"{latency[name]:.1f}" for name in ("p50", "p90", "p99", "p99.9", "max")),
        f"{measured.cpu_seconds / moved:.3f}" if moved else "-",
        str(measured.errors),
        str(measured.wrong) if config.verify else "-",
    ]


def _latency(histogram: Histogram) -> str:
    values = histogram.summary()
    return ", ".join(f"{name} {values[name]:.2f}" for name in ("p50", "p90", "p99", "p99.9", "max"))


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *rows]
    ]
