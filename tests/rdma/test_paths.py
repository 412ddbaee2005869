"""Which NICs carry the bytes, and what happens when one of them goes away: counted at the devices."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mooncake_hpc import READ, REQUEST, WRITE, TransferEngine
from mooncake_hpc.core.settings import RdmaSettings, Settings
from mooncake_hpc.testing.peer import PeerProcess, digest, pattern

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("rxe", "forked_peers")]

SIZE = 24 << 20
PIECE = 1 << 18
P2P = "P2PHANDSHAKE"
PACKETS = "/sys/class/infiniband/{}/ports/1/hw_counters/sent_pkts"
QUICK = Settings(rdma=RdmaSettings(rail_pause=1.0))


def sent(device: str) -> int:
    """Packets that a device has sent so far."""
    return int(Path(PACKETS.format(device)).read_text())


def cable(device: str, state: str) -> None:
    """Plug a soft-RoCE device's network cable: its other end, at the bridge, goes up or down."""
    subprocess.run(["ip", "link", "set", f"rocep{device[3:]}", state], check=True, timeout=20)


@contextlib.contextmanager
def unplugged(device: str) -> Iterator[None]:
    cable(device, "down")
    try:
        yield
    finally:
        cable(device, "up")


@contextlib.contextmanager
def pair(ours: Sequence[str], theirs: Sequence[str], **options: Any) -> Iterator[tuple[TransferEngine, PeerProcess]]:
    """Our engine on some devices, and a peer that finds only its own."""
    env = {**os.environ, "MC_TE_FILTERS": ",".join(theirs), "MC_RDMA_RAIL_PAUSE_SECONDS": "1"}
    with (
        PeerProcess(P2P, "rdma", env=env) as peer,
        TransferEngine(
            "ours:1", P2P, protocol="rdma", bind_address="127.0.0.1",
            **{"device_name": ",".join(ours), "settings": QUICK, **options},
        ) as engine,
    ):  # fmt: skip
        yield engine, peer


def until_shared(devices: Sequence[str], transfer: Callable[[], None], least: float) -> None:
    """Transfer again until each device has carried its share: paths are opened, and come back, in the background."""
    deadline = time.monotonic() + 40
    while True:
        before = [sent(device) for device in devices]
        transfer()
        shares = [sent(device) - packets for device, packets in zip(devices, before, strict=True)]
        if min(shares) > least * sum(shares):
            return
        assert time.monotonic() < deadline, shares


def pieces(opcode: int, target: int, local: int, remote: int, size: int = SIZE) -> Any:
    records = np.zeros(size // PIECE, REQUEST)
    records["opcode"], records["target_id"], records["length"] = opcode, target, PIECE
    records["local_addr"] = local + PIECE * np.arange(len(records))
    records["remote_addr"] = remote + PIECE * np.arange(len(records))
    return records


def test_slices_of_one_request_use_all_near_devices(rxe: list[str]) -> None:
    with pair(rxe[:2], rxe[2:4]) as (engine, peer):
        local, remote = engine.allocate(SIZE), peer.call("allocate", SIZE)
        local[:] = pattern(1, SIZE)
        segment = engine.open_segment(peer.name)
        until_shared(rxe[:2], lambda: engine.write(local, segment, remote), 0.2)
        assert peer.call("digest", remote) == digest(local)


def test_the_matrix_decides(rxe: list[str], tmp_path: Path) -> None:
    """The near device carries, the other one rests, until the near one's cable is pulled."""
    near, other = rxe[:2]
    matrix = tmp_path / "matrix.json"
    matrix.write_text(json.dumps({location: [[near], [other]] for location in ("cpu:0", "cpu:1")}))
    with pair((), rxe[2:3], nic_priority_matrix=str(matrix)) as (engine, peer):
        local, remote = engine.allocate(SIZE), peer.call("allocate", SIZE, 2)
        segment = engine.open_segment(peer.name)
        before = sent(other)
        engine.read(local, segment, remote)
        assert digest(local) == peer.call("digest", remote) and sent(other) - before < 100
        with unplugged(near):
            local[:] = pattern(3, SIZE)
            engine.write(local, segment, remote, timeout=60)
            assert peer.call("digest", remote) == digest(local) and sent(other) - before > 1000


@pytest.mark.parametrize("opcode", [READ, WRITE])
def test_a_cable_is_pulled_and_plugged_in_mid_batch(rxe: list[str], opcode: int) -> None:
    """Every byte arrives, by the other device; and the first one comes back by itself."""
    with pair(rxe[:2], rxe[2:4]) as (engine, peer):
        local, remote = engine.allocate(SIZE), peer.call("allocate", SIZE, 4)
        segment = engine.open_segment(peer.name)
        requests = pieces(opcode, segment.id, int(local.ctypes.data), remote)
        engine.submit(requests).wait(60)
        for number in range(2):
            if opcode == WRITE:
                local[:] = pattern(10 + number, SIZE)
            else:
                local[:] = 0
                peer.call("fill", remote, 20 + number)
            batch = engine.submit(requests)
            time.sleep(0.05)
            with unplugged(rxe[number]):
                batch.wait(90)
            assert peer.call("digest", remote) == digest(local)
        until_shared(rxe[:2], lambda: engine.submit(requests).wait(60), 0.1)


def test_with_every_path_gone_the_first_cause_is_told(rxe: list[str]) -> None:
    from mooncake_hpc.core.errors import TransferError

    with pair(rxe[:1], rxe[2:3]) as (engine, peer):
        local, remote = engine.allocate(SIZE), peer.call("allocate", SIZE)
        segment = engine.open_segment(peer.name)
        engine.write(local, segment, remote)
        with unplugged(rxe[0]):
            began = time.monotonic()
            with pytest.raises(TransferError, match=rxe[0]) as caught:
                engine.write(local, segment, remote, timeout=60)
            assert time.monotonic() - began < 60 and "flush" not in str(caught.value).lower()
        deadline = time.monotonic() + 40
        while True:
            try:
                engine.write(local, segment, remote, timeout=30)
                break
            except TransferError:
                assert time.monotonic() < deadline
                time.sleep(0.5)


def test_rewritten_addresses_while_cables_are_pulled(rxe: list[str]) -> None:
    """Round after round on the same addresses: no byte of an older round appears after a newer one has ended."""
    chooser = np.random.default_rng(5)
    with pair(rxe[:2], rxe[2:4]) as (engine, peer):
        local, remote = engine.allocate(4 << 20), peer.call("allocate", 4 << 20)
        segment = engine.open_segment(peer.name)
        requests = pieces(WRITE, segment.id, int(local.ctypes.data), remote, 4 << 20)
        for number in range(1, 25):
            local[:] = number
            batch = engine.submit(requests)
            device = rxe[number % 2]
            time.sleep(chooser.uniform(0, 0.05))
            with unplugged(device) if number % 4 == 0 else contextlib.nullcontext():
                batch.wait(60)
            assert peer.call("uniform", remote) == number
