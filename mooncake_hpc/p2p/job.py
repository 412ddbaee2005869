"""Trainer, inferencer, and both as the ranks of an MPI job."""

from __future__ import annotations

import contextlib
import shlex
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from mooncake_hpc.core.authentication import flags_of
from mooncake_hpc.core.errors import ConfigError, IntegrityError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.jobs.job_etcd import EMBEDDED, job_metadata, login_variables, own_metadata
from mooncake_hpc.native import prepare
from mooncake_hpc.p2p.buffers import digest_all
from mooncake_hpc.p2p.layout import Memory
from mooncake_hpc.p2p.manifest import UNVERIFIED
from mooncake_hpc.p2p.progress import Progress
from mooncake_hpc.p2p.replication import Replica
from mooncake_hpc.p2p.report import Bar, FanOut, list_lines, pull_json, pull_lines, write_json
from mooncake_hpc.p2p.store import P2PStore
from mooncake_hpc.transports.choice import engine_options

if TYPE_CHECKING:
    from mooncake_hpc.jobs.mpi import World

POLL = 0.2  # seconds between two looks of a trainer at its replicas
QUIET = 1.0  # seconds for which nobody pulls from us before we leave

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class P2PConfig:
    """A run of the P2P commands. Sizes in bytes unless the name says otherwise, times in seconds."""

    cmd: str = ""
    metadata_server: str = ""
    local_server_name: str = ""
    protocol: str = "auto"
    device_name: str = ""  # RDMA devices, commas between; empty: all
    nic_priority_matrix: str = ""  # a file's name
    auto_discovery: bool = False
    name: str = "mooncake-model"
    file_size_mb: int = 2048
    size: int = 0  # bytes; 0: file_size_mb
    shard_size: int = 0
    digest: str = "xxh3-128"
    seed: int = 1
    force: bool = False
    file: str = ""
    out: str = ""
    overwrite: bool = False
    idle: float = 0.0
    linger: float = 30.0
    wait: float = 300.0
    timeout: float = 0.0
    alone: bool = True
    json: str = ""

    @property
    def nbytes(self) -> int:
        return self.size or self.file_size_mb << 20


def open_store(config: P2PConfig, metadata: str, settings: Settings) -> P2PStore:
    options = engine_options(config.protocol, config.device_name, config.nic_priority_matrix, config.auto_discovery)
    return P2PStore(config.local_server_name, metadata, settings=settings, **options)


def publish(store: P2PStore, config: P2PConfig) -> None:
    """Register the file, or a model of seeded content."""
    if config.file:
        from mooncake_hpc.p2p.register_files import register_path

        register_path(
            store, config.name, config.file, shard_size=config.shard_size, algorithm=config.digest, force=config.force
        )
        return
    model = store.allocate(config.nbytes)
    prepare.fill(model, config.seed)
    store.register(config.name, model, shard_size=config.shard_size, algorithm=config.digest, force=config.force)


def check_whole(replica: Replica) -> str:
    """Compute all digests again, over the whole object as it lies in memory; what to say of it. IntegrityError."""
    manifest = replica.manifest
    if manifest.algorithm == UNVERIFIED:
        return "not verified: the original publishes no digests"
    if digest_all(Memory(replica.arrays), manifest.shard_size, manifest.algorithm) != manifest.digests:
        raise IntegrityError(f"object {manifest.name!r}: what lies in memory does not match its manifest")
    return f"verified: {manifest.shards} shards by {manifest.algorithm}"


def run_trainer(config: P2PConfig, settings: Settings, say: Say) -> int:
    """Publish and serve until KeyboardInterrupt, or until for `idle` seconds nobody has pulled. The exit code."""
    with ExitStack() as stack:
        metadata, settings = own_metadata(config.metadata_server, config.local_server_name, settings, stack)
        store = stack.enter_context(open_store(config, metadata, settings))
        started = time.monotonic()
        publish(store, config)
        (info,) = [one for one in store.list(config.name) if one.name == config.name]
        say(
            f"trainer {store.name}: object {info.name!r}, version {info.version}, {info.size} bytes in "
            f"{info.shards} shards of {info.shard_size}, published in {time.monotonic() - started:.2f} s; "
            f"{login_variables(settings)}{shlex.join([f'--metadata_server={metadata}', *flags_of(settings)])}"
        )
        with contextlib.suppress(KeyboardInterrupt):
            _serve(store, config, say)
        say("ALL DONE")
    return 0


def _serve(store: P2PStore, config: P2PConfig, say: Say) -> None:
    told, last_change = "", time.monotonic()
    while not config.idle or time.monotonic() - last_change < config.idle:
        holders = store.holders(config.name)
        shards = sum(int(holder.have.sum()) for holder in holders)
        whole = sum(1 for holder in holders if holder.have.all())
        text = f"{whole} replicas elsewhere, {len(holders) - whole} under way"
        if (mark := f"{text} {shards}") != told:
            if text not in told:
                say(text)
            told, last_change = mark, time.monotonic()
        time.sleep(POLL)


def run_inferencer(config: P2PConfig, settings: Settings, say: Say) -> int:
    """Pull the object, check it, serve those who still pull from us, and leave. The exit code."""
    if config.metadata_server == EMBEDDED:
        raise ConfigError("--metadata_server=embedded: an inferencer needs its trainer's metadata server")
    with open_store(config, config.metadata_server, settings) as store:
        bar = Bar()
        try:
            if config.out:
                from mooncake_hpc.p2p.fetch_files import fetch_path

                replica = fetch_path(
                    store,
                    config.name,
                    config.out,
                    wait=config.wait,
                    timeout=config.timeout or None,
                    progress=bar,
                    overwrite=config.overwrite,
                )
            else:
                replica = store.get_replica(config.name, wait=config.wait, timeout=config.timeout or None, progress=bar)
        finally:
            bar.close()
        for line in pull_lines(store.name, replica.progress):
            say(line)
        say(check_whole(replica))
        if config.json:
            write_json(config.json, pull_json(store.name, socket.gethostname(), asdict(config), replica.progress))
        store.wait_unused(config.name, QUIET, config.linger)
        say("ALL DONE")
    return 0


def run_list(config: P2PConfig, settings: Settings, say: Say) -> int:
    """Print the objects whose names begin with `name`, their holders and progress."""
    from mooncake_hpc.metadata.store import open_store as open_metadata
    from mooncake_hpc.p2p.catalog import Catalogue
    from mooncake_hpc.p2p.mooncake_payload import list_originals

    with open_metadata(config.metadata_server, settings) as store:
        ours = Catalogue(store, settings.metadata_cluster_id).list(config.name)
        for line in list_lines(ours + list_originals(store, config.name)):
            say(line)
    return 0


def run_ranks(config: P2PConfig, settings: Settings, world: World, say: Say) -> int:
    """One rank's part: rank 0 publishes, the others pull at once; rank 0 reports. The exit code of this rank."""
    if world.size < 2:
        raise ConfigError("mooncake-hpc p2p needs 2 ranks at least: one publishes, the others pull")
    settle = settings.settle_timeout
    wait = settle + (config.timeout or 600.0)
    with ExitStack() as stack:
        metadata, settings = job_metadata(config.metadata_server, settings, world, stack, settle)
        with open_store(config, metadata, settings) as store:
            if world.rank == 0:
                publish(store, config)
            names = world.allgather(store.name, wait, "rank 0 publishes")
            with world.suspecting(store.engine, names):
                alone = _pull_alone(config, store, world, wait) if config.alone else None
                result = _pull_together(config, store, world, wait)
            ends = world.gather((store.name, result), wait, "results")
            world.barrier(wait, "all ranks leave")
        world.barrier(settle, "all ranks withdraw their keys")  # before rank 0 ends an embedded etcd
    if world.rank == 0:
        fan_out = _add_up(ends, alone, config)
        for line in fan_out.lines():
            say(line)
        if config.json:
            write_json(config.json, {**fan_out.as_json(), "config": asdict(config)})
        say("ALL DONE")
    return 0


def _pull_alone(config: P2PConfig, store: P2PStore, world: World, wait: float) -> float | None:
    """Seconds that rank 1 takes while the others rest: the rate of one link."""
    seconds = None
    if world.rank == 1:
        result = _pull(config, store, lambda: None)
        seconds = result.seconds
    return world.allgather(seconds, wait, "one reader alone")[1]


def _pull_together(config: P2PConfig, store: P2PStore, world: World, wait: float) -> Progress | None:
    if world.rank == 0:
        world.barrier(wait, "buffers are touched")
        world.barrier(wait, "all pull")
        return None
    return _pull(
        config, store, lambda: world.barrier(wait, "buffers are touched"), lambda: world.barrier(wait, "all pull")
    )


def _pull(
    config: P2PConfig, store: P2PStore, ready: Callable[[], None], done: Callable[[], None] = lambda: None
) -> Progress:
    """Pull into touched memory, from `ready` on; check; let go once `done` returns."""
    (info,) = [one for one in store.list(config.name) if one.name == config.name]
    target = store.allocate(max(1, info.size))
    prepare.touch(target)
    ready()
    begin = time.monotonic()
    if config.file:
        replica = store.get_replica(config.name, timeout=config.timeout or None)
    else:
        replica = store.get_replica(config.name, target[: info.size], timeout=config.timeout or None)
    result = replace(replica.progress, seconds=time.monotonic() - begin)
    check_whole(replica)
    done()
    store.delete_replica(config.name)
    store.engine.unregister(target)
    return result


def _add_up(ends: list[tuple[str, Progress | None]], alone: float | None, config: P2PConfig) -> FanOut:
    ranks = {name: rank for rank, (name, _) in enumerate(ends)}
    results = {rank: result for rank, (_, result) in enumerate(ends) if result is not None}
    one = next(iter(results.values()))
    fan_out = FanOut(one.size, one.shards, len(results), alone)
    for rank, result in results.items():
        fan_out.seconds[rank] = result.seconds
        fan_out.failures += sum(result.failures.values())
        fan_out.wrong += sum(result.wrong.values())
        for source, nbytes in result.sources.items():
            fan_out.served[ranks[source]] = fan_out.served.get(ranks[source], 0) + nbytes
    return fan_out
