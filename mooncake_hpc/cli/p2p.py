"""The command `p2p-store-example`, also `mooncake-hpc p2p`: flags, and which of the P2P Store's jobs they mean."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from mooncake_hpc.cli import glog
from mooncake_hpc.cli.gflags import Flag, FlagSet, Parsed
from mooncake_hpc.cli.transport import AUTHENTICATION_FLAGS, RDMA_FLAGS, asked, check_secret, read_settings
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.memory import system_memory
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.jobs.mpi import Launch, World, alike, default_name, detect
from mooncake_hpc.p2p.digests import ALGORITHMS
from mooncake_hpc.p2p.job import P2PConfig, run_inferencer, run_list, run_ranks, run_trainer
from mooncake_hpc.transports.choice import PROTOCOLS, choose_here

_DEFAULTS = {f.name: f.default for f in fields(P2PConfig)}


def _flag(name: str, text: str, unit: str = "", choices: tuple[str, ...] = ()) -> Flag:
    """A flag that is a field of P2PConfig: its default is the field's."""
    return Flag(name, _DEFAULTS[name], text, unit, choices)  # type: ignore[arg-type]


FLAGS = FlagSet(
    "p2p-store-example",
    "A trainer publishes an object; any number of inferencers, started before or after it, pull it from the trainer "
    "and from one another. `mooncake-hpc p2p ls` lists objects. Under mpirun or srun without --cmd, rank 0 trains and "
    "the others pull at the same time.",
    {
        "Who and where": (
            _flag("cmd", "trainer publishes and serves; inferencer pulls; ls lists.",
                  choices=("", "trainer", "inferencer", "ls")),
            _flag("metadata_server", "host:port of an etcd, etcd://a:1,b:2 for several endpoints of one, or embedded "
                  "to start one (a trainer, or rank 0). No default."),
            _flag("local_server_name", "Name of this process's segment, unique, host:port by custom: only a name, but "
                  "an address of this machine in it is the one published. Default: the host's name; under a "
                  "launcher <host>:<12345 + rank>."),
        ),
        "Object": (
            _flag("name", "The object's name; for ls the beginning of names."),
            _flag("file_size_mb", "Size of the simulated model.", "MiB"),
            _flag("size", "The same in bytes; 0: file_size_mb.", "bytes"),
            _flag("seed", "Seed of the simulated model's content."),
            _flag("file", "Publish this file, or this folder of files, instead of a simulated model."),
            _flag("out", "Write the object to this file or folder. It grows in OUT.partial and is moved into place "
                  "once it is whole and verified; a pull that was stopped goes on where it was. A folder must be "
                  "empty; links, devices and what other programs have made stay as they are."),
            _flag("overwrite", "Replace the plain file that is at --out already."),
            _flag("shard_size", "Size of a shard; 0 chooses one.", "bytes"),
            _flag("digest", "Digest of the shards.", choices=ALGORITHMS),
            _flag("force", "Publish although somebody else's object has the name."),
        ),
        "Time": (
            _flag("idle", "A trainer leaves when nobody has pulled for so long; 0: it stays until Ctrl-C.", "seconds"),
            _flag("linger", "An inferencer stays at most so long for those that pull from it.", "seconds"),
            _flag("wait", "An inferencer waits so long for the object to be published.", "seconds"),
            _flag("timeout", "A pull fails after this; 0: never.", "seconds"),
        ),
        "Transport": (
            _flag("protocol", "What carries the bytes; auto is shared memory where both sides share a host. Unnamed, "
                  "and with a device or matrix named, it is rdma.", choices=PROTOCOLS),
            *RDMA_FLAGS,
            *AUTHENTICATION_FLAGS,
        ),
        "Ranks": (
            _flag("alone", "Let one rank pull alone first: what efficiency is measured against. --noalone does not."),
            _flag("json", "File to which the result is appended as one line of JSON."),
        ),
        "Logging (glog's)": (*glog.FLAGS, *glog.IGNORED),
    },
)  # fmt: skip


def main(arguments: Sequence[str], command: Sequence[str] = ("p2p-store-example",)) -> int:
    """Run the job; the exit code. Raises ConfigError and what the P2P Store raises; the caller prints."""
    launch = detect()
    with alike(launch):
        flags = _parse(arguments)
        if flags.asks:
            if launch is None or launch.rank == 0:
                FLAGS.answer(flags)
            return 0
        settings = read_settings(flags)
        _check(P2PConfig(**_values(flags)), launch)
    glog.set_up(flags)
    if launch is None or flags.text("cmd"):
        config = _configure_rank(flags, settings, launch)
        return {"ls": run_list, "trainer": run_trainer, "inferencer": run_inferencer}[config.cmd](
            config, settings, _say
        )
    world = World(launch, settle=settings.settle_timeout)
    with world.guarded():
        return run_ranks(_configure_rank(flags, settings, launch), settings, world, _say)


def check(arguments: Sequence[str], launch: Launch, here: bool) -> None:
    """Raise ConfigError for what cannot be in a job of such ranks: on whatever machines they run, or on this one."""
    flags = _parse(arguments)
    if flags.asks:
        return
    settings = read_settings(flags)
    _check(P2PConfig(**_values(flags)), launch)
    if here:
        configure(flags, settings)


def _parse(arguments: Sequence[str]) -> Parsed:
    if arguments and arguments[0] == "ls":
        arguments = ["--cmd=ls", *arguments[1:]]
    return FLAGS.parse(arguments, os.environ)


def _say(line: str) -> None:
    print(line, flush=True)


def configure(flags: Parsed, settings: Settings) -> tuple[P2PConfig, str]:
    """The run that the flags mean on this machine, and notices. Raises ConfigError for what it cannot have here."""
    check_secret(settings)
    choice = choose_here(asked(flags), settings)
    config = P2PConfig(**{**_values(flags), **choice.as_config()})
    if config.cmd in ("", "trainer") and not config.file and config.nbytes > (memory := system_memory()):
        raise ConfigError(f"a model of {config.nbytes} bytes, but this machine has {memory} bytes of memory and swap")
    return config, choice.notice


def _configure_rank(flags: Parsed, settings: Settings, launch: Launch | None) -> P2PConfig:
    """The same with a name; rank 0 prints the notices."""
    config, notice = configure(flags, settings)
    if notice and (launch is None or launch.rank == 0):
        print(notice, file=sys.stderr)
    if config.cmd == "ls":
        return config if "name" in flags.named else replace(config, name="")
    return replace(config, local_server_name=config.local_server_name or default_name(launch))


def _values(flags: Parsed) -> dict[str, Any]:
    """The fields of P2PConfig as the command line has them."""
    return {name: flags.values[name] for name in _DEFAULTS}


def _check(config: P2PConfig, launch: Launch | None) -> None:
    if not config.metadata_server:
        raise ConfigError("--metadata_server is missing: host:port of an etcd, etcd://a:1,b:2, or embedded")
    if not config.cmd and launch is None:
        raise ConfigError("--cmd is missing: trainer, inferencer or ls; without it, start ranks by mpirun or srun")
    for name in ("file_size_mb", "size", "shard_size", "idle", "linger", "wait", "timeout"):
        if getattr(config, name) < 0:
            raise ConfigError(f"--{name}={getattr(config, name)} is below 0")
