"""The choices of launch/_rdma.sh and launch/setup-rdma: whose devices, and whose pyverbs. In the guest, and wherever
the kernel makes soft-RoCE devices, they can be made in the other ways too."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from conftest import ROOT, clean_env
from rdma_resources import resources

HERE = "tests/rdma/test_ways.py"
POINTERS = "tests/rdma/test_pointers.py::test_pointers_that_are_not_as_expected"
OTHER = os.environ.get("MOONCAKE_TEST_PYVERBS", "")  # folder of another release, with a libibverbs of its own


def test_devices_are_found(nics: list[str]) -> None:
    assert set(nics) <= set(os.listdir("/sys/class/infiniband")) and resources()["qp"] >= 0


def test_one_library_is_loaded(nics: list[str]) -> None:
    """The one that pyverbs was built for, whichever that is; its objects are as expected, and its GIDs the kernel's."""
    import pyverbs

    from mooncake_hpc.transports.rdma import gid, verbs

    device = verbs.Device(nics[0], 1)
    assert device.gids() == gid.read_table(gid.INFINIBAND / nics[0] / "ports/1") != []
    device.register(id(device) & -4096, 4096, False, False, False, False).close()  # by libibverbs, without pyverbs
    device.close()
    lines = Path("/proc/self/maps").read_text().splitlines()
    loaded = {Path(line.split()[-1]) for line in lines if "/libibverbs.so" in line}
    assert len(loaded) == 1 and verbs.pointers_work, loaded
    if OTHER and os.environ.get("PYTHONPATH") == OTHER:
        assert Path(pyverbs.__path__[0]).is_relative_to(OTHER) and loaded.pop().is_relative_to(Path(OTHER).parent)


def run(*command: str, seconds: float = 60, **env: str) -> str:
    """What the command says; it has to succeed."""
    done = subprocess.run(
        command, cwd=ROOT, env=clean_env(**env), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_devices_that_are_there_are_taken(rxe: list[str], tmp_path: Path) -> None:
    said = run("launch/_rdma.sh", str(tmp_path), f"{HERE}::test_devices_are_found")
    assert f"RDMA tests: on this machine's devices, {' '.join(rxe)}" in said and "1 passed" in said, said
    assert (tmp_path / "r.xml").exists()


def test_else_soft_roce_devices_are_made_and_another_pyverbs_works_too(rxe: list[str], tmp_path: Path) -> None:
    """Transfers, the pointers and their check, over a release whose libibverbs is another than the system's."""
    run("launch/soft-roce", "down")
    try:
        tests = (f"{HERE}::test_one_library_is_loaded", f"{POINTERS}[QP_NUMBER]")
        said = run("launch/_rdma.sh", str(tmp_path), *tests, seconds=150, PYTHONPATH=OTHER)
        assert "RDMA tests: soft-RoCE on this machine's kernel" in said and "2 passed" in said, said
        assert os.listdir("/sys/class/infiniband") == []  # they were taken away again
    finally:
        run("launch/soft-roce", "up", str(len(rxe)))
