"""Benches over RDMA against the original's, in both roles, through real commands and a real etcd."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence

import pytest
from conftest import ROOT, Start
from interop import NEWEST, OUR_BENCH, bench_target, peer_bench, peer_env, run_bench

from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.settings import Settings

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("nics")]

SMALL = ("--block_size=65536", "--batch_size=8", "--threads=1", f"--buffer_size={4 << 20}", "--duration=1")
OPERATIONS = ("read", "write")
SETUPS = [  # how many NICs, how many queue pairs
    pytest.param((1, 2), id="1nic-2qp"),
    pytest.param((2, 1), id="2nics-1qp"),
]
operation_axis = pytest.mark.parametrize("operation", OPERATIONS)
_port = itertools.count(22000)


class Bench:
    """Bench processes of one set-up: `nics` devices, `queue_pairs` an endpoint."""

    def __init__(self, etcd: str, devices: Sequence[str], nics: int, queue_pairs: int) -> None:
        self._etcd = etcd
        self.flags = (
            "--protocol=rdma",
            *SMALL,
            f"--metadata_server={etcd}",
            f"--device_name={','.join(devices[:nics])}",
        )
        self.env = {"MC_NUM_QP_PER_EP": str(queue_pairs), "MC_GID_INDEX": "1"}

    @contextlib.contextmanager
    def target(self, command: tuple[str, ...]) -> Iterator[str]:
        """A target's name, once its segment stands in etcd with its buffers' keys."""
        name = unused_name()
        flags = (*self.flags, f"--local_server_name={name}")
        with bench_target(command, *flags, ready=lambda _: self._published(name), timeout=60, **self.env) as found:
            yield found

    def initiate(self, command: tuple[str, ...], segment: str, operation: str, name: str = "", *flags: str) -> None:
        """An initiator that must end well, having moved something."""
        where = (f"--local_server_name={name or unused_name()}", f"--segment_id={segment}")
        batches, _ = run_bench(
            command, *self.flags, *where, f"--operation={operation}", *flags, timeout=120, **self.env
        )
        assert batches > 0

    def _published(self, name: str) -> str:
        with open_store(self._etcd, Settings()) as store:
            text = store.get(f"mooncake/ram/{name}") or ""
        return name if '"rkey"' in text else ""


def unused_name() -> str:
    return f"127.0.0.1:{next(_port)}"


@pytest.fixture(scope="module", params=SETUPS)
def bench(request: pytest.FixtureRequest, etcd: str, nics: list[str]) -> Bench:
    return Bench(etcd, nics, *request.param)


@pytest.fixture(scope="module")
def our_target(bench: Bench) -> Iterator[str]:
    with bench.target(OUR_BENCH) as name:
        yield name


@pytest.fixture(scope="module")
def original_target(bench: Bench) -> Iterator[str]:
    with bench.target(peer_bench(NEWEST)) as name:
        yield name


@operation_axis
def test_the_original_addresses_our_target(bench: Bench, our_target: str, operation: str) -> None:
    bench.initiate(peer_bench(NEWEST), our_target, operation)


@operation_axis
def test_we_address_the_originals_target(bench: Bench, original_target: str, operation: str) -> None:
    bench.initiate(OUR_BENCH, original_target, operation, "", "--verify", "--workers=0")


def killed_in_mid_run(start: Start, bench: Bench, command: tuple[str, ...], segment: str, name: str) -> None:
    """An initiator under `name` that has moved something when it is killed."""
    flags = (*bench.flags, f"--local_server_name={name}", f"--segment_id={segment}", "--duration=60")
    process = start(*command, "--mode=initiator", *flags, env=peer_env(**bench.env), cwd=ROOT)
    deadline = time.monotonic() + 60
    busy = sent_packets()
    while sent_packets() < busy + 200:
        assert process.poll() is None and time.monotonic() < deadline, "nothing moves"
        time.sleep(0.1)
    process.kill()
    process.wait(10)


def sent_packets() -> int:
    """Of all devices together."""
    total = 0
    for device in os.listdir("/sys/class/infiniband"):
        with open(f"/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts") as file:
            total += int(file.read())
    return total


@pytest.mark.usefixtures("rxe")
def test_a_second_initiator_under_the_name_of_one_that_died(
    start: Start, bench: Bench, our_target: str, original_target: str
) -> None:
    """Either target takes the new process's queue pairs for the dead one's."""
    for command, segment in ((peer_bench(NEWEST), our_target), (OUR_BENCH, original_target)):
        name = unused_name()
        killed_in_mid_run(start, bench, command, segment, name)
        bench.initiate(command, segment, "write", name)


def test_the_rig(etcd: str, nics: list[str]) -> None:
    """The original works against itself on these devices: what fails above is ours."""
    bench = Bench(etcd, nics, 1, 2)
    with bench.target(peer_bench(NEWEST)) as name:
        bench.initiate(peer_bench(NEWEST), name, "read")
