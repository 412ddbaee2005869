"""The batch script of the ranks' tests as it stands, on a real Slurm of two nodes, over RDMA."""

from __future__ import annotations

from pathlib import Path

import pytest
from rdma_resources import nothing_is_left as nothing_is_left
from sandbox import sandbox

PACKETS = "/sys/class/infiniband/{}/ports/1/hw_counters/sent_pkts"


@pytest.mark.timeout(400)
def test_pytest_mpi(rxe: list[str], tmp_path: Path) -> None:
    """Nodes share the devices, whose network is not theirs. That they carried the bytes is seen at the devices."""

    def sent() -> int:
        return sum(int(Path(PACKETS.format(device)).read_text()) for device in rxe)

    with sandbox(nodes=2) as slurm:
        before = sent()
        job = slurm.run("pytest-mpi.sbatch", folder=tmp_path, seconds=300)
        assert (job.state, job.code) == ("COMPLETED", "0:0"), job
        assert job.results == [{"passed": 8, "failed": 0, "skipped": 0, "failures": []}], job
        assert sent() - before > 8 * 100, job
        slurm.check_clean(tmp_path)
