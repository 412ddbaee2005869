"""A bench from beginning to end: one target process, one initiator process, or all ranks of an MPI job."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from mooncake_hpc.bench.node import CPU_INTERVAL, Initiator, Result, Target
from mooncake_hpc.bench.plan import AUTO_WORKERS, BenchConfig, roles
from mooncake_hpc.bench.report import (
    Units,
    configuration_lines,
    final_line,
    json_object,
    report_lines,
    total,
    write_json,
)
from mooncake_hpc.bench.runner import Measured, longest_run
from mooncake_hpc.core.authentication import flags_of
from mooncake_hpc.core.errors import ConfigError, MooncakeError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.jobs.job_etcd import EMBEDDED, job_metadata, login_variables, own_metadata
from mooncake_hpc.jobs.mpi import Launch, World, default_name
from mooncake_hpc.transports.choice import engine_options

if TYPE_CHECKING:
    from mooncake_hpc import TransferEngine
    from mooncake_hpc.workers.pool import WorkerPool


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go: `say` prints a line on stdout, `json` is a file's path or ""."""

    say: Callable[[str], None]
    units: Units
    json: str = ""

    def report(self, config: BenchConfig, results: Sequence[Result], targets_cpu: float | None) -> int:
        """Print and write everything; the exit code."""
        whole = total(results)
        for line in report_lines(config, results, targets_cpu, self.units):
            self.say(line)
        if self.json:
            write_json(self.json, json_object(config, results, targets_cpu))
        self.say(final_line(config, whole, self.units))
        return 1 if whole.failure or whole.wrong else 0

    def interrupted(self, config: BenchConfig, measured: Measured) -> None:
        """Say what was measured before Ctrl-C; it is no result."""
        done = final_line(config, measured, self.units).partition(": ")[2]
        self.say(f"INTERRUPTED before the {config.duration:g} s were over: {done}")


def running_line(config: BenchConfig) -> str:
    line = f"connected and warm; running for {config.duration:g} s"
    return f"{line}, with verification in {longest_run(config):g} s at most" if config.verify else line


def worker_pool(config: BenchConfig) -> WorkerPool:
    """What fills and verifies buffers: worker processes where there is work for them, else this process."""
    from mooncake_hpc.workers.pool import WorkerPool

    if config.workers == AUTO_WORKERS:
        return WorkerPool(None if config.verify else 0)
    return WorkerPool(config.workers)


def open_engine(config: BenchConfig, metadata: str, settings: Settings) -> TransferEngine:
    from mooncake_hpc import TransferEngine

    return TransferEngine(
        config.local_server_name,
        metadata,
        bind_all=config.bind_all,
        settings=replace(settings, transfer_timeout=config.timeout),
        **engine_options(config.protocol, config.device_name, config.nic_priority_matrix, config.auto_discovery),
    )


def run_target(config: BenchConfig, settings: Settings, output: Output, command: Sequence[str]) -> int:
    """Publish buffers and serve until KeyboardInterrupt; prints the initiator's `command` with what it needs."""
    with ExitStack() as stack:
        metadata, settings = own_metadata(config.metadata_server, config.local_server_name, settings, stack)
        engine = stack.enter_context(open_engine(config, metadata, settings))
        target = Target(engine, config)
        sizes = ", ".join(str(buffer.size) for buffer in target.buffers)
        with contextlib.suppress(KeyboardInterrupt):  # from the first word on: who reads it may end us at once
            output.say(f"target {engine.name} is ready with buffers of {sizes} bytes; the initiator's command:")
            output.say(initiator_command(config, engine.name, metadata, settings, command))
            while True:
                target.tick()
                time.sleep(CPU_INTERVAL)
        output.say(f"target {engine.name} ends")
    return 0


def initiator_command(
    config: BenchConfig, segment: str, metadata: str, settings: Settings, command: Sequence[str]
) -> str:
    """A command line for the shell that runs an initiator against this target."""
    host, separator, port = segment.rpartition(":")
    name = f"{host}:{int(port) + 1}" if separator and port.isdigit() and int(port) < 65535 else f"{segment}-initiator"
    words = [*command, "--mode=initiator", f"--metadata_server={metadata}", f"--segment_id={segment}"]
    words += [f"--local_server_name={name}", f"--protocol={config.protocol}", *flags_of(settings)]
    defaults = {f.name: f.default for f in fields(BenchConfig)}
    for flag in ("operation", "block_size", "batch_size", "threads", "duration"):
        if getattr(config, flag) != defaults[flag]:
            words.append(f"--{flag}={getattr(config, flag)}")
    return login_variables(settings) + shlex.join(words)


def run_initiator(config: BenchConfig, settings: Settings, output: Output) -> int:
    """Address `config.segment_id` for the configured time and report; the exit code."""
    if config.metadata_server == EMBEDDED:
        raise ConfigError("--metadata_server=embedded: an initiator on its own needs its target's metadata server")
    with open_engine(config, config.metadata_server, settings) as engine, worker_pool(config) as pool:
        initiator = Initiator(engine, config, [config.segment_id], [0])
        for line in configuration_lines(config):
            output.say(line)
        initiator.warm_up(pool)
        before = initiator.target_cpu()
        output.say(running_line(config))
        try:
            result = initiator.run(pool, output.say)
        except KeyboardInterrupt:
            output.interrupted(config, initiator.measured)
            raise
        after = None if before is None or config.verify or result.measured.failure else initiator.target_cpu()
        cpu = None if before is None or after is None else after - before
        return output.report(config, [result], cpu)


@dataclass(frozen=True, slots=True)
class _End:
    """What a rank hands in: an initiator's result, and the CPU seconds of a rank that was only a target."""

    result: Result | None
    target_cpu: float | None


def run_ranks(config: BenchConfig, settings: Settings, launch: Launch, world: World, output: Output) -> int:
    """One rank's part of the job; rank 0 reports. The exit code of this rank."""
    wait = config.timeout + settings.settle_timeout
    with ExitStack() as stack:
        metadata, settings = job_metadata(config.metadata_server, settings, world, stack, wait)
        config = replace(config, mode="by rank", local_server_name=config.local_server_name or default_name(launch))
        with open_engine(config, metadata, settings) as engine:
            ends = _measure(config, engine, world, output, wait)
            code = _report_all(config, ends, output) if world.rank == 0 else 0
        world.barrier(wait, "all ranks withdraw their keys")  # before rank 0 ends an embedded etcd
    return code


def _measure(config: BenchConfig, engine: TransferEngine, world: World, output: Output, wait: float) -> list[_End]:
    """This rank's roles from buffers to results; every rank's end on rank 0."""
    all_roles = roles(config.pattern, world.size)
    role = all_roles[world.rank]
    if role.initiators:
        Target(engine, config, len(role.initiators))
    names = world.allgather(engine.name, wait, "targets publish their buffers")
    if world.rank == 0:
        for line in [*configuration_lines(config), f"ranks={world.size}"]:
            output.say(line)
    with ExitStack() as stack:
        stack.enter_context(world.suspecting(engine, names))
        initiator = None
        if role.targets:
            pool = stack.enter_context(worker_pool(config))
            regions = [all_roles[target].region(world.rank) for target in role.targets]
            initiator = Initiator(engine, config, [names[target] for target in role.targets], regions)
            initiator.warm_up(pool)
        world.barrier(wait + config.batch_timeout * config.warmup, "initiators connect and warm up")
        if world.rank == 0:
            output.say(running_line(config))
        cpu = time.process_time()
        first = next(rank for rank, each in enumerate(all_roles) if each.targets)
        tell = output.say if world.rank == first else None
        result = initiator.run(pool, tell) if initiator else None
        if result and result.measured.failure:  # ends the job: a sum over the others would look complete
            raise MooncakeError(f"{engine.name}: {result.measured.failure}")
    if result:
        result.rank = world.rank
    world.barrier(longest_run(config) + config.batch_timeout + wait, "initiators run")
    target_cpu = None if initiator or config.verify else time.process_time() - cpu
    return world.gather(_End(result, target_cpu), wait, "results")


def _report_all(config: BenchConfig, ends: Sequence[_End], output: Output) -> int:
    cpus = [end.target_cpu for end in ends if end.target_cpu is not None]
    return output.report(config, [end.result for end in ends if end.result], sum(cpus) if cpus else None)
