"""The P2P Store's commands as processes of their own, with kills, over a real etcd."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Start, clean_env

from mooncake_hpc.metadata.store import open_store
from mooncake_hpc.p2p.catalog import Catalogue, ObjectInfo

P2P = [sys.executable, "-m", "mooncake_hpc", "p2p"]
TTL = 2.0
_ports = itertools.count(21000)


def env(**more: str) -> dict[str, str]:
    return clean_env(MC_TCP_BIND_ADDRESS="127.0.0.1", MOONCAKE_HPC_LEASE_TTL=str(TTL), **more)


def command(cmd: str, etcd: str, *flags: str) -> list[str]:
    return [*P2P, f"--cmd={cmd}", f"--metadata_server={etcd}", f"--local_server_name=127.0.0.1:{next(_ports)}", *flags]


def await_line(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return line
    pytest.fail(f"no {text!r} in:\n{''.join(seen)}")


def finish(process: subprocess.Popen[str], timeout: float = 100) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def await_progress(etcd: str, name: str, enough: Callable[[ObjectInfo], bool]) -> None:
    """Look at an object until `enough`."""
    deadline = time.monotonic() + 90
    with open_store(etcd) as store:
        catalogue = Catalogue(store, "")
        while not any(enough(info) for info in catalogue.list(name)):
            assert time.monotonic() < deadline, catalogue.list(name)
            time.sleep(0.005)


def left_behind(etcd: str) -> list[str]:
    """Our keys in etcd once leases have had time to end."""
    deadline = time.monotonic() + 4 * TTL + 10
    with open_store(etcd) as store:
        while keys := [*store.list("mooncake_hpc/p2p/"), *store.list("mooncake/")]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
    return keys


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["tcp", "auto"])
def test_the_seeds_commands(start: Start, etcd: str, protocol: str) -> None:
    """One inferencer is started before the trainer; no address of a trainer is given."""
    name = f"--name=seed-{protocol}"
    flags = (f"--protocol={protocol}", "--device_name=erdma_0", name)
    early = start(*command("inferencer", etcd, *flags), env=env())
    trainer = start(*command("trainer", etcd, *flags, "--file_size_mb=32", "--idle=60"), env=env())
    await_line(trainer, "published")
    late = start(*command("inferencer", etcd, *flags), env=env())
    for process in (early, late):
        output = finish(process)
        assert output.rstrip().endswith("ALL DONE")
        assert re.search(r"33554432 bytes in \d+ shards.* GB/s", output) and "verified: " in output
        assert re.search(
            r"from 127.0.0.1:\d+: \d+ bytes, [\d.]+ %, by " + ("tcp" if protocol == "tcp" else "shm"), output
        )
    listing = subprocess.run(
        [*P2P, "ls", f"--metadata_server={etcd}", name], env=env(), capture_output=True, text=True, timeout=60
    )
    assert f"seed-{protocol}" in listing.stdout and "33554432" in listing.stdout, listing
    trainer.send_signal(signal.SIGINT)
    output, _ = trainer.communicate(timeout=30)
    assert trainer.returncode == 0 and output.rstrip().endswith("ALL DONE"), output
    assert left_behind(etcd) == []


@pytest.mark.slow
def test_a_trainer_leaves_when_idle(start: Start, etcd: str) -> None:
    trainer = start(*command("trainer", etcd, "--name=idle", "--size=100000", "--idle=0.5"), env=env())
    assert "0 replicas elsewhere" in finish(trainer, 60)


@pytest.mark.slow
def test_files_through_the_commands(start: Start, etcd: str, tmp_path: Path) -> None:
    model = tmp_path / "model.bin"
    model.write_bytes(np.random.default_rng(5).bytes(3_000_000))
    trainer = start(*command("trainer", etcd, "--name=file", f"--file={model}"), env=env())
    await_line(trainer, "published")
    finish(start(*command("inferencer", etcd, "--name=file", f"--out={tmp_path / 'out.bin'}"), env=env()))
    assert (tmp_path / "out.bin").read_bytes() == model.read_bytes()
    again = start(*command("inferencer", etcd, "--name=file", f"--out={tmp_path / 'out.bin'}"), env=env())
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 1 and "out.bin exists" in output and "--overwrite" in output


@pytest.mark.slow
def test_bad_flags(etcd: str) -> None:
    for flags, text in (
        (["--cmd=trainer"], "--metadata_server is missing"),
        ([f"--metadata_server={etcd}"], "--cmd is missing"),
        ([f"--metadata_server={etcd}", "--cmd=inferencer", "--name=none", "--wait=0.1"], "nobody has registered"),
        ([f"--metadata_server={etcd}", "--cmd=trainer", "--size=-1"], "below 0"),
    ):
        done = subprocess.run([*P2P, *flags], env=env(), capture_output=True, text=True, timeout=60)
        assert done.returncode in (1, 2) and text in done.stderr, done


@pytest.mark.slow
def test_a_killed_reader_costs_the_others_little(start: Start, etcd: str) -> None:
    flags = ("--name=reader", "--protocol=tcp")
    trainer = start(*command("trainer", etcd, *flags, "--file_size_mb=64", "--shard_size=262144"), env=env())
    await_line(trainer, "published")
    readers = [start(*command("inferencer", etcd, *flags), env=env()) for _ in range(3)]
    seen: set[str] = set()

    def all_have_begun(info: ObjectInfo) -> bool:
        seen.update(info.holders)
        return len(seen) == 4

    await_progress(etcd, "reader", all_have_begun)
    readers[0].kill()
    for reader in readers[1:]:
        assert "ALL DONE" in finish(reader)
    trainer.send_signal(signal.SIGINT)
    trainer.communicate(timeout=30)
    assert left_behind(etcd) == []


@pytest.mark.slow
def test_ranks(mpirun: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    words = ["--metadata_server=embedded", "--protocol=tcp", "--file_size_mb=16", f"--json={file}"]
    done = subprocess.run(
        [mpirun, "-n", "4", *P2P, *words], cwd=ROOT, env=env(), capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0 and done.stdout.rstrip().endswith("ALL DONE"), done
    assert "fan-out efficiency" in done.stdout and "objects sent by the seed" in done.stdout
    result = json.loads(file.read_text())
    assert result["readers"] == 3 and set(result["seconds"]) == {"1", "2", "3"} and result["wrong"] == 0
    assert sum(result["served"].values()) == 3 * 16 << 20
