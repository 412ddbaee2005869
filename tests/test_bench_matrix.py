"""The matrix of every pair: each pair once, rounds without conflicts, what is printed and written."""

from __future__ import annotations

import json

import pytest

from mooncake_hpc.bench.matrix import Matrix, rounds
from mooncake_hpc.bench.node import Result
from mooncake_hpc.bench.plan import BenchConfig
from mooncake_hpc.bench.report import Units
from mooncake_hpc.bench.runner import Measured
from mooncake_hpc.core.errors import MooncakeError


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("size", range(2, 18))
def test_rounds_have_every_ordered_pair_once(size: int, at_once: bool) -> None:
    plan = rounds(size, at_once)
    pairs = [pair for together in plan for pair in together]
    assert sorted(pairs) == [(a, b) for a in range(size) for b in range(size) if a != b]
    for together in plan:
        ranks = [rank for pair in together for rank in pair]
        assert len(ranks) == len(set(ranks))
    assert len(plan) == (2 * (size - 1 + size % 2) if at_once else size * (size - 1))


def matrix(size: int) -> Matrix:
    """Rank a addresses b at 10·a + b batches of 1 MB a second."""
    config = BenchConfig(block_size=1000, batch_size=1000, threads=1)
    pairs = {
        (a, b): Result(f"h{a}:1", [f"h{b}:1"], Measured(seconds=1.0, batches=10 * a + b), ["tcp"], {})
        for (a, b) in (pair for together in rounds(size, False) for pair in together)
    }
    return Matrix(config, [f"h{r}:1" for r in range(size)], [f"h{r}" for r in range(size)], pairs)


def test_the_table_names_the_slowest_pair() -> None:
    assert matrix(3).lines(Units("MB", 0)) == [
        "MB/s, reads; rows address columns",
        "    0   1   2",
        "0   -   1   2  h0:1",
        "1  10   -  12  h1:1",
        "2  20  21   -  h2:1",
        "median 11 MB/s, fastest 21 MB/s, slowest 1 MB/s: rank 0 on h0 addressing rank 1 on h1",
    ]


def test_json_has_rows_and_pairs() -> None:
    value = json.loads(json.dumps(matrix(2).as_json()))
    assert value["bytes_per_second"] == [[None, 1e6], [1e7, None]]
    assert [(p["initiator"], p["target"], p["bytes_per_second"]) for p in value["pairs"]] == [(0, 1, 1e6), (1, 0, 1e7)]
    assert value["ranks"] == [{"name": "h0:1", "host": "h0"}, {"name": "h1:1", "host": "h1"}]


def test_a_matrix_with_a_hole_is_no_matrix() -> None:
    whole = matrix(3)
    del whole.pairs[1, 2]
    with pytest.raises(MooncakeError, match=r"without the pairs \[\(1, 2\)\]"):
        Matrix(whole.config, whole.names, whole.hosts, whole.pairs)
