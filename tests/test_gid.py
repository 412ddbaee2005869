"""Which GID of a port is chosen: the ranking, and reading the table from a made-up sysfs."""

from __future__ import annotations

import ipaddress
import random
from pathlib import Path

import pytest
from sysfs_tree import GidRow, add_device

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.rdma.gid import ROCE_V1_OR_IB, ROCE_V2, Gid, candidates, rank

AUTO = Settings.from_env({})
LINK_LOCAL = "fe80:0000:0000:0000:5054:00ff:fe12:3456"
PRIVATE = "0000:0000:0000:0000:0000:ffff:0a4d:0001"  # 10.77.0.1
PUBLIC = "0000:0000:0000:0000:0000:ffff:0808:0808"


def gid(address: str, index: int = 0, kind: str = ROCE_V2, netdev: str = "eth0") -> Gid:
    plain = ipaddress.ip_address(address)
    value = plain.packed if plain.version == 6 else bytes(10) + b"\xff\xff" + plain.packed
    return Gid(index, value, kind, netdev)


def table(tmp_path: Path, *rows: GidRow | None, link: str = "Ethernet", settings: Settings = AUTO) -> list[int]:
    add_device(tmp_path, "mlx5_0", gids=rows, link=link)
    return [g.index for g in candidates("mlx5_0", 1, settings, tmp_path / "sys/class/infiniband")]


BEST_FIRST = [
    gid("8.8.8.8", 9),
    gid("2001:4860::1", 10),
    gid("1.1.1.1", 2, netdev=""),
    gid("10.0.0.1", 8),
    gid("172.16.0.1", 12),
    gid("192.168.1.1", 13),
    gid("100.64.0.1", 14),
    gid("fd00::1", 15),
    gid("10.0.0.2", 3, netdev=""),
    gid("fe80::1", 4),
    gid("169.254.1.1", 5),
    gid("fe80::2", 1, netdev=""),
    gid("::1", 0),
]


@pytest.mark.parametrize("seed", range(10))
def test_rank(seed: int) -> None:
    shuffled = BEST_FIRST[:]
    random.Random(seed).shuffle(shuffled)
    assert rank(shuffled, infiniband=False) == BEST_FIRST


def test_only_roce_v2_on_ethernet_and_ib_on_infiniband() -> None:
    both = [gid("8.8.8.8", 0, ROCE_V1_OR_IB), gid("10.0.0.1", 1, ROCE_V2)]
    assert [g.index for g in rank(both, infiniband=False)] == [1]
    assert [g.index for g in rank(both, infiniband=True)] == [0]


def test_text_is_the_originals() -> None:
    assert gid("10.77.0.1").text == "00:00:00:00:00:00:00:00:00:00:ff:ff:0a:4d:00:01"
    assert len(gid("fe80::1").text) == 47


def test_a_usual_roce_port(tmp_path: Path) -> None:
    """Every address twice, as RoCE v1 and v2: the seed's index 3 is the IPv4 address of RoCE v2."""
    rows = [
        (LINK_LOCAL, ROCE_V1_OR_IB, "eth0"),
        (LINK_LOCAL, ROCE_V2, "eth0"),
        (PRIVATE, ROCE_V1_OR_IB, "eth0"),
        (PRIVATE, ROCE_V2, "eth0"),
    ]
    assert table(tmp_path, *rows) == [3, 1]


def test_soft_roce_port(tmp_path: Path) -> None:
    assert table(tmp_path, (LINK_LOCAL, ROCE_V2, "roce0"), (PRIVATE, ROCE_V2, "roce0"), None) == [1, 0]


def test_holes_are_no_candidates(tmp_path: Path) -> None:
    assert table(tmp_path, None, None, (PUBLIC, ROCE_V2, ""), None) == [2]


def test_infiniband_port(tmp_path: Path) -> None:
    assert table(tmp_path, (LINK_LOCAL, ROCE_V1_OR_IB, ""), link="InfiniBand") == [0]


@pytest.mark.parametrize("variable", ["MC_GID_INDEX", "NCCL_IB_GID_INDEX"])
def test_the_variable_wins(tmp_path: Path, variable: str) -> None:
    settings = Settings.from_env({variable: "0"})
    rows = ((LINK_LOCAL, ROCE_V2, "roce0"), (PRIVATE, ROCE_V2, "roce0"))
    assert table(tmp_path, *rows, settings=settings) == [0]


def test_mc_before_nccl(tmp_path: Path) -> None:
    settings = Settings.from_env({"MC_GID_INDEX": "1", "NCCL_IB_GID_INDEX": "0"})
    assert table(tmp_path, (LINK_LOCAL, ROCE_V2, "a"), (PRIVATE, ROCE_V2, "a"), settings=settings) == [1]


def test_index_without_a_gid(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mlx5_0 port 1 has no GID of index 7 .*10\.77\.0\.1 \(RoCE v2, roce0\)"):
        table(tmp_path, (PRIVATE, ROCE_V2, "roce0"), settings=Settings.from_env({"MC_GID_INDEX": "7"}))


def test_no_gid(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mlx5_0 port 1 has no GID that can be used .*Its GIDs: none"):
        table(tmp_path, None, None)


def test_no_port(tmp_path: Path) -> None:
    add_device(tmp_path, "mlx5_0")
    with pytest.raises(ConfigError, match=r"mlx5_0 has no port 2 \(MC_IB_PORT\)"):
        candidates("mlx5_0", 2, AUTO, tmp_path / "sys/class/infiniband")
