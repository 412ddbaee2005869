"""Addresses, sizes and roles of the bench: pure functions."""

from __future__ import annotations

import numpy as np
import pytest

from mooncake_hpc import READ, REQUEST, WRITE
from mooncake_hpc.bench.plan import PATTERNS, BenchConfig, Remote, build_requests, check_room, cover_requests, roles
from mooncake_hpc.core.errors import ConfigError

SMALL = BenchConfig(block_size=64, batch_size=4, threads=3, buffer_size=4096)


def test_addresses_are_the_originals() -> None:
    for thread in range(3):
        requests = build_requests(SMALL, thread, 1000, [Remote(7, 5000)])
        assert requests["local_addr"].tolist() == [1000 + 64 * (j * 3 + thread) for j in range(4)]
        assert (requests["remote_addr"] - requests["local_addr"] == 4000).all()
        assert set(requests["length"]) == {64} and set(requests["target_id"]) == {7}
        assert set(requests["opcode"]) == {READ}


def test_addresses_above_two_to_the_63_survive() -> None:
    high = (1 << 64) - 4096
    requests = build_requests(SMALL, 2, high, [Remote(0, high)])
    assert int(requests["local_addr"][-1]) == high + 64 * 11


def test_all_submitters_cover_the_footprint_once() -> None:
    batches = [build_requests(SMALL, t, 0, [Remote(0, 0)]) for t in range(3)]
    cover = cover_requests(batches, WRITE)
    assert cover["local_addr"].tolist() == [64 * s for s in range(12)]
    assert cover.dtype == REQUEST and set(cover["opcode"]) == {WRITE} and set(batches[0]["opcode"]) == {READ}


def test_several_targets_share_the_slots_evenly() -> None:
    remotes = [Remote(i, i << 20) for i in range(4)]
    batches = [build_requests(SMALL, t, 0, remotes) for t in range(3)]
    ids, counts = np.unique(np.concatenate(batches)["target_id"], return_counts=True)
    assert ids.tolist() == [0, 1, 2, 3] and counts.tolist() == [3, 3, 3, 3]


def test_room() -> None:
    check_room(SMALL, "t:1", 0, 768, 0)
    with pytest.raises(ConfigError, match=r"segment t:1: buffer 1 has 767 bytes.*needs 768.*--buffer_size=768"):
        check_room(SMALL, "t:1", 1, 767, 0)
    with pytest.raises(ConfigError, match="in region 2 needs 2304"):
        check_room(SMALL, "t:1", 1, 2303, 2)


@pytest.mark.parametrize(
    "bad",
    [{"block_size": 0}, {"batch_size": -1}, {"threads": 0}, {"duration": 0}, {"duration": float("nan")},
     {"timeout": float("inf")}, {"operation": "swap"}, {"buffer_size": 1 << 60}, {"warmup": -1},
     {"block_size": 1 << 40, "batch_size": 1 << 20}],
)  # fmt: skip
def test_impossible_configurations(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(bad)))):
        BenchConfig(**bad).check_memory()  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [2, 4, 6])
def test_roles_are_consistent(pattern: str, size: int) -> None:
    all_roles = roles(pattern, size)
    assert len(all_roles) == size
    for rank, role in enumerate(all_roles):
        assert role.targets or role.initiators
        assert rank not in role.targets
        for target in role.targets:
            assert rank in all_roles[target].initiators
            assert 0 <= all_roles[target].region(rank) < len(all_roles[target].initiators)
        for initiator in role.initiators:
            assert rank in all_roles[initiator].targets


def test_roles_by_pattern() -> None:
    assert [r.targets for r in roles("pairs", 4)] == [(), (), (0,), (1,)]
    assert [r.targets for r in roles("fan_in", 3)] == [(), (0,), (0,)]
    assert [r.targets for r in roles("fan_out", 3)] == [(1, 2), (), ()]
    assert [r.targets for r in roles("all_to_all", 3)] == [(1, 2), (0, 2), (0, 1)]
    assert roles("fan_in", 4)[0].region(3) == 2


@pytest.mark.parametrize(("pattern", "size"), [("pairs", 3), ("pairs", 1), ("fan_in", 1), ("ring", 2)])
def test_impossible_roles(pattern: str, size: int) -> None:
    with pytest.raises(ConfigError, match=f"--pattern={pattern}"):
        roles(pattern, size)
