"""RDMA with the original: its bench against our nodes and commands, and ours against its target, over a real etcd."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from conftest import ROOT, Start
from interop import NEWEST, OUR_BENCH, VERSIONS, bench_target, peer_bench, peer_env, run_bench

from mooncake_hpc import READ, TransferEngine
from mooncake_hpc.core.settings import RdmaSettings, Settings
from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.testing.link import requests
from mooncake_hpc.testing.peer import PeerProcess, pattern

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("forked_peers")]

HOST = "127.0.0.1"
SIZE = 4 << 20
SMALL = ("--block_size=65536", "--batch_size=8", "--threads=1", f"--buffer_size={SIZE}", "--duration=1")
_port = itertools.count(22000)


def unused_name() -> str:
    return f"{HOST}:{next(_port)}"


class Setup:
    """`nics` devices a side, `queue_pairs` an endpoint; the same for the original and for ours."""

    def __init__(self, etcd: str, devices: Sequence[str], nics: int, queue_pairs: int) -> None:
        self.etcd, self.queue_pairs = etcd, queue_pairs
        self.devices = ",".join(devices[:nics])
        self.flags = ("--protocol=rdma", *SMALL, f"--metadata_server={etcd}", f"--device_name={self.devices}")
        self.env = {"MC_NUM_QP_PER_EP": str(queue_pairs), "MC_GID_INDEX": "1"}

    def node(self, name: str) -> PeerProcess:
        """A node of ours in another process."""
        return PeerProcess(self.etcd, "rdma", name, env={**peer_env(**self.env), "MC_TE_FILTERS": self.devices})

    def engine(self, name: str) -> TransferEngine:
        """One in this process."""
        settings = Settings(rdma=RdmaSettings(queue_pairs=self.queue_pairs))
        where = {"protocol": "rdma", "bind_address": HOST, "device_name": self.devices}
        return TransferEngine(name, self.etcd, settings=settings, **where)

    def initiate(self, command: tuple[str, ...], segment: str, operation: str, name: str = "", *more: str) -> None:
        """A bench initiator that must end well, having moved something."""
        where = (f"--local_server_name={name or unused_name()}", f"--segment_id={segment}", f"--operation={operation}")
        batches, _ = run_bench(command, *self.flags, *where, *more, timeout=120, **self.env)
        assert batches > 0

    def published(self, name: str) -> str:
        """`name` once its segment stands in etcd with its buffers' keys, else ""."""
        with open_store(self.etcd, Settings()) as store:
            text = store.get(f"mooncake/ram/{name}") or ""
        return name if '"rkey"' in text else ""


@pytest.fixture(scope="module", params=[(1, 2), (2, 1)], ids=["1nic-2qp", "2nics-1qp"])
def setup(request: pytest.FixtureRequest, etcd: str, nics: list[str]) -> Setup:
    return Setup(etcd, nics, *request.param)


@pytest.fixture(scope="module")
def original_target(setup: Setup) -> Iterator[str]:
    name = unused_name()
    flags = (*setup.flags, f"--local_server_name={name}")
    with bench_target(
        peer_bench(NEWEST), *flags, ready=lambda _: setup.published(name), timeout=60, **setup.env
    ) as found:
        yield found


@pytest.fixture(scope="module")
def our_node(setup: Setup) -> Iterator[PeerProcess]:
    """With two buffers, as the original's initiator expects."""
    with setup.node(unused_name()) as peer:
        peer.call("allocate", SIZE, 1)
        peer.call("allocate", SIZE, 2)
        yield peer


@pytest.mark.parametrize("operation", ["read", "write"])
def test_the_original_addresses_our_node(setup: Setup, our_node: PeerProcess, operation: str) -> None:
    setup.initiate(peer_bench(NEWEST), our_node.name, operation)


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_older_originals_address_our_node(etcd: str, nics: list[str], version: str) -> None:
    setup = Setup(etcd, nics, 1, 2)
    with setup.node(unused_name()) as node:
        node.call("allocate", SIZE, 1)
        node.call("allocate", SIZE, 2)
        for operation in ("write", "read"):
            setup.initiate(peer_bench(version), node.name, operation)


def test_we_address_the_originals_target(setup: Setup, original_target: str) -> None:
    """What we write we read again, in requests of all sizes, several a batch."""
    with setup.engine(unused_name()) as ours:
        sent, got = ours.allocate(SIZE), ours.allocate(SIZE)
        segment = ours.open_segment(original_target)
        remote = segment.buffers[0].address
        sent[:] = pattern(setup.queue_pairs, SIZE)
        ours.write(sent, segment, remote)
        cuts = [0, 1, 8, 4097, 70_000, 70_001, 1_000_003, SIZE]
        order = np.random.default_rng(1).permutation(len(cuts) - 1)
        base = int(got.ctypes.data)
        records = [(READ, segment.id, base + cuts[i], remote + cuts[i], cuts[i + 1] - cuts[i]) for i in order]
        ours.submit(requests(*records)).wait(30)
        assert (got == sent).all()
        assert set(ours.lane_bytes()) and all(lane.startswith("rdma/") for lane in ours.lane_bytes())


def sent_packets() -> int:
    """Of all devices together."""
    total = 0
    for device in os.listdir("/sys/class/infiniband"):
        with open(f"/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts") as file:
            total += int(file.read())
    return total


def until_busy(alive: object) -> None:
    """Until the devices have sent some hundred packets more."""
    before, deadline = sent_packets(), time.monotonic() + 60
    while sent_packets() < before + 300:
        assert time.monotonic() < deadline, f"nothing moves: {alive}"
        time.sleep(0.05)


@pytest.mark.usefixtures("rxe")
def test_a_second_original_under_the_name_of_one_that_was_killed(
    start: Start, setup: Setup, our_node: PeerProcess
) -> None:
    name = unused_name()
    flags = (*setup.flags, f"--local_server_name={name}", f"--segment_id={our_node.name}", "--duration=60")
    first = start(*peer_bench(NEWEST), "--mode=initiator", *flags, env=peer_env(**setup.env), cwd=ROOT)
    until_busy(first.args)
    first.kill()
    first.wait(10)
    setup.initiate(peer_bench(NEWEST), our_node.name, "write", name)


@pytest.mark.usefixtures("rxe")
def test_a_second_node_of_ours_under_the_name_of_one_that_was_killed(setup: Setup, original_target: str) -> None:
    """The original's target gives the dead one's queue pairs up for the new one's."""
    name = unused_name()
    with setup.engine(unused_name()) as ours:
        remote = ours.open_segment(original_target).buffers[0].address
    for killed in (True, False):
        with setup.node(name) as node:
            node.call("hammer", original_target, remote, 1 << 20, True)
            until_busy(name)
            if killed:
                node.process.kill()
                node.process.wait(10)
            else:
                batches, error = node.call("stop_hammer")
                assert batches > 0 and error == ""


def test_our_command_against_the_originals_and_the_other_way_round(etcd: str, nics: list[str]) -> None:
    """The bench of both, as users start them; and the original against itself: what fails above is ours."""
    setup = Setup(etcd, nics, 1, 2)
    names = unused_name(), unused_name()
    ready = setup.published
    with (
        bench_target(
            peer_bench(NEWEST), *setup.flags, f"--local_server_name={names[0]}", ready=lambda _: ready(names[0]),
            timeout=60, **setup.env,
        ),
        bench_target(
            OUR_BENCH, *setup.flags, f"--local_server_name={names[1]}", "--workers=0", ready=lambda _: ready(names[1]),
            timeout=120, **setup.env,
        ),
    ):  # fmt: skip
        setup.initiate(peer_bench(NEWEST), names[0], "read")
        setup.initiate(peer_bench(NEWEST), names[1], "read")
        setup.initiate(OUR_BENCH, names[0], "write", "", "--verify", "--workers=0")
