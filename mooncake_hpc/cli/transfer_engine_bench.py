"""The command `transfer_engine_bench`, also `mooncake-hpc bench`: flags, and which of the bench's jobs they mean."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mooncake_hpc.bench.plan import MATRIX, PATTERNS, BenchConfig, roles
from mooncake_hpc.bench.report import UNITS, Units
from mooncake_hpc.cli import glog
from mooncake_hpc.cli.gflags import Flag, FlagSet, Parsed
from mooncake_hpc.cli.transport import AUTHENTICATION_FLAGS, RDMA_FLAGS, asked, check_secret, read_settings
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.jobs.mpi import Launch, World, alike, default_name, detect
from mooncake_hpc.transports.choice import PROTOCOLS, choose_here

if TYPE_CHECKING:
    from mooncake_hpc.bench.job import Output

_DEFAULTS = {f.name: f.default for f in fields(BenchConfig)}


def _flag(name: str, text: str, unit: str = "", choices: tuple[str, ...] = ()) -> Flag:
    """A flag that is a field of BenchConfig: its default is the field's."""
    return Flag(name, _DEFAULTS[name], text, unit, choices)  # type: ignore[arg-type]


FLAGS = FlagSet(
    "transfer_engine_bench",
    "Measures reads or writes of a target's memory. Start a target, then an initiator with the command that the "
    "target prints; or all at once under mpirun or srun, where rank and --pattern decide who is what.",
    {
        "Who and where": (
            _flag("mode", "target publishes buffers and waits; initiator addresses them. Under a launcher, naming it "
                  "makes every rank a process on its own.", choices=("initiator", "target")),
            _flag("metadata_server", "Where segments are found: host:port of an etcd, etcd://a:1,b:2 for several "
                  "endpoints of one, P2PHANDSHAKE for none, embedded to start one (a target, or rank 0). No default."),
            _flag("local_server_name", "Name of this process's segment, unique, host:port by custom: only a name, but "
                  "an address of this machine in it is the one published. Default: the host's name; under a "
                  "launcher <host>:<12345 + rank>."),
            _flag("segment_id", "Name of the target's segment. An initiator must be given it."),
            _flag("pattern", "Under a launcher: pairs (rank r + n/2 addresses rank r), fan_in (all address rank 0), "
                  "fan_out (rank 0 addresses all), all_to_all; matrix measures every pair, one after the other.",
                  choices=(*PATTERNS, MATRIX)),
            Flag("at_once", False, "With --pattern=matrix: pairs that have no rank in common at the same time."),
        ),
        "Load": (
            _flag("operation", "What initiators do.", choices=("read", "write")),
            _flag("block_size", "Size of a request.", "bytes"),
            _flag("batch_size", "Requests that are submitted together.", "requests"),
            _flag("threads", "Submitters; each has one batch under way.", "threads"),
            _flag("duration", "Length of the timed window.", "seconds"),
            _flag("buffer_size", "Size of each of a target's buffers; raised to block_size × batch_size × threads.",
                  "bytes"),
            _flag("warmup", "Batches of each submitter before the timed window.", "batches"),
            Flag("timeout", 0.0, "A batch fails after this, plus 1 ns a byte. 0: MC_TRANSFER_TIMEOUT, or 30.",
                 "seconds"),
        ),
        "Transport": (
            Flag("protocol", "rdma", "What carries the bytes; auto is shared memory where both sides share a host, "
                 "else tcp. A named one is never replaced; unnamed, and with no RDMA device, it is tcp.",
                 choices=PROTOCOLS),
            *RDMA_FLAGS,
            *AUTHENTICATION_FLAGS,
            _flag("bind_all", "Listen on all addresses instead of the published one: with --secret_file, where "
                  "others reach them."),
            Flag("backend", "classic", "Accepted for the original's command lines.", choices=("classic",)),
        ),
        "Verification": (
            _flag("verify", "Compare every byte of every round, outside the timed window."),
            _flag("verify_interval", "Batches of each submitter in a round; then the pattern changes.", "batches"),
            _flag("seed", "Seed of the pattern."),
            _flag("workers", "Processes that fill and compare buffers; -1: as many as fit, where there is work.",
                  "processes"),
        ),
        "Report": (
            Flag("report_unit", "GB", f"Unit of throughput: {', '.join(UNITS)} a second."),
            Flag("report_precision", 2, "Decimals of throughput.", "digits"),
            Flag("json", "", "File to which the result is appended as one line of JSON."),
        ),
        "Logging (glog's)": (*glog.FLAGS, *glog.IGNORED),
    },
    epilog="Booleans: --flag, --noflag, --flag=false. Also: --flagfile=FILE, --fromenv=NAME, --undefok=NAME, "
    "--help, --version.\nEnvironment: MC_TCP_BIND_ADDRESS (the address to publish), MC_TCP_PROTO, "
    "MC_METADATA_CLUSTER_ID,\nMC_MIN_RPC_PORT, MC_MAX_RPC_PORT and others: docs/variables.md.",
)  # fmt: skip


def main(arguments: Sequence[str], command: Sequence[str] = ("transfer_engine_bench",)) -> int:
    """Run the bench; the exit code. `command` starts this program, for the line that a target prints.

    Raises ConfigError and what the bench raises; the caller prints.
    """
    launch = detect()
    with alike(launch):
        flags = FLAGS.parse(arguments, os.environ)
        if flags.asks:
            if launch is None or launch.rank == 0:
                FLAGS.answer(flags)
            return 0
        settings = read_settings(flags)
        _check(flags, settings, launch)
    glog.set_up(flags)
    if launch is None or _alone(flags, launch):
        return _run_alone(flags, settings, launch, command)
    world = World(launch, settle=settings.settle_timeout)
    with world.guarded():
        return _run_ranks(flags, settings, launch, world)


def check(arguments: Sequence[str], launch: Launch, here: bool) -> None:
    """Raise ConfigError for what cannot be in a job of such ranks: on whatever machines they run, or on this one."""
    flags = FLAGS.parse(arguments, os.environ)
    if flags.asks:
        return
    settings = read_settings(flags)
    _check(flags, settings, launch)
    if here:
        configure(flags, settings)


def _alone(flags: Parsed, launch: Launch | None) -> bool:
    """Whether this process has one mode, whatever launched it."""
    return launch is None or "mode" in flags.named or (launch.size == 1 and bool(flags.text("segment_id")))


def _values(flags: Parsed, settings: Settings) -> dict[str, Any]:
    """The fields of BenchConfig as the command line has them."""
    timeout = flags.number("timeout") or settings.transfer_timeout
    return {**{name: flags.values[name] for name in _DEFAULTS}, "timeout": timeout}


def configure(flags: Parsed, settings: Settings) -> tuple[BenchConfig, str]:
    """The run that the flags mean on this machine, and notices. Raises ConfigError for what it cannot have here."""
    check_secret(settings)
    choice = choose_here(asked(flags), settings)
    config = BenchConfig(**{**_values(flags, settings), **choice.as_config()})
    config.check_memory()
    notice = choice.notice
    if config.footprint > config.buffer_size:
        notice += f"\nWARNING: --buffer_size raised from {config.buffer_size} to {config.footprint} bytes"
        config = replace(config, buffer_size=config.footprint)
    if (unit := flags.text("report_unit")) not in UNITS:
        notice += f"\nWARNING: --report_unit={unit} is none of {', '.join(UNITS)}: using GB"
    return config, notice.strip()


def _check(flags: Parsed, settings: Settings, launch: Launch | None) -> None:
    """Flags that must be there, those that a job of ranks cannot use, and values that can be nowhere."""
    if not 0 <= flags.integer("report_precision") <= 12:
        raise ConfigError(f"--report_precision={flags.integer('report_precision')} must be 0 to 12")
    if not flags.text("metadata_server"):
        raise ConfigError(
            "--metadata_server is missing: host:port of an etcd, etcd://a:1,b:2, P2PHANDSHAKE, or embedded"
        )
    config = BenchConfig(**_values(flags, settings))
    if _alone(flags, launch):
        if flags.text("mode") == "initiator" and not flags.text("segment_id"):
            raise ConfigError("--segment_id is missing: the name that the target was started with or has printed")
        return
    for name in ("segment_id", "local_server_name"):
        if flags.text(name):
            raise ConfigError(
                f"--{name} has no meaning where ranks take roles by --pattern; name --mode as well to make "
                f"every rank a process on its own"
            )
    if launch and launch.size and config.pattern != MATRIX:
        roles(config.pattern, launch.size)


def _run_alone(flags: Parsed, settings: Settings, launch: Launch | None, command: Sequence[str]) -> int:
    from mooncake_hpc.bench import job

    config, notice = configure(flags, settings)
    _notify(notice, launch)
    config = replace(config, local_server_name=config.local_server_name or default_name(launch))
    if config.mode == "target":
        return job.run_target(config, settings, _output(flags), command)
    return job.run_initiator(config, settings, _output(flags))


def _run_ranks(flags: Parsed, settings: Settings, launch: Launch, world: World) -> int:
    from mooncake_hpc.bench import job, matrix

    config, notice = configure(flags, settings)
    _notify(notice, launch)
    output = _output(flags, written=world.rank == 0)
    if config.pattern == MATRIX:
        return matrix.run_ranks(config, flags.boolean("at_once"), settings, launch, world, output)
    return job.run_ranks(config, settings, launch, world, output)


def _notify(notice: str, launch: Launch | None) -> None:
    if notice and (launch is None or launch.rank == 0):
        print(notice, file=sys.stderr)


def _output(flags: Parsed, written: bool = True) -> Output:
    """Where results go. Raises ConfigError where the JSON file, if it is `written` here, cannot be."""
    from mooncake_hpc.bench.job import Output

    path = flags.text("json")
    if written and path and not os.access(Path(path).absolute().parent, os.W_OK):
        raise ConfigError(f"--json={path}: the folder {Path(path).absolute().parent} cannot be written")
    unit = flags.text("report_unit")
    units = Units(unit if unit in UNITS else "GB", flags.integer("report_precision"))
    return Output(lambda line: print(line, flush=True), units, path)
