"""The batch script of the ranks' tests as it stands, on a real Slurm of two nodes, over RDMA."""

from __future__ import annotations

from pathlib import Path

import pytest
from rdma_resources import nothing_is_left as nothing_is_left
from sandbox import sandbox

PACKETS = "/sys/class/infiniband/{}/ports/1/hw_counters/sent_pkts"
CHOSEN = "tests/mpi/test_ranks.py::test_patterns[all_to_all-write]"  # in the guest each more takes 10 to 15 s
PACKETS_AT_LEAST = 2 * 2 * 8  # two ranks, two threads, a batch of 8


@pytest.mark.timeout(400)
def test_pytest_mpi(rxe: list[str], tmp_path: Path) -> None:
    """Nodes share the devices, whose network is not theirs. That they carried the bytes is seen at the devices."""

    def sent() -> int:
        return sum(int(Path(PACKETS.format(device)).read_text()) for device in rxe)

    with sandbox(nodes=2) as slurm:
        before = sent()
        job = slurm.run("pytest-mpi.sbatch", CHOSEN, folder=tmp_path, seconds=300)
        assert (job.state, job.code) == ("COMPLETED", "0:0"), job
        assert job.results == [{"passed": 1, "failed": 0, "skipped": 0, "failures": []}], job
        assert sent() - before > PACKETS_AT_LEAST, job
        slurm.check_clean(tmp_path)
