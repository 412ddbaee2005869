"""What the environment says: every RDMA variable reaches its setting; what cannot be is told by the variable's name."""

from __future__ import annotations

import pytest

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import RdmaSettings, Settings

RDMA = {
    "MC_GID_INDEX": ("3", "gid_index", 3),
    "NCCL_IB_GID_INDEX": ("4", "gid_index", 4),
    "MC_AUTO_GID_MAX_RETRIES": ("5", "gid_retries", 5),
    "MC_IB_PORT": ("2", "port", 2),
    "MC_MTU": ("1024", "mtu", 1024),
    "MC_IB_TC": ("96", "traffic_class", 96),
    "MC_IB_SL": ("3", "service_level", 3),
    "MC_PKEY_INDEX": ("1", "pkey_index", 1),
    "MC_IB_PCI_RELAXED_ORDERING": ("0", "relaxed_ordering", False),
    "MC_NUM_QP_PER_EP": ("4", "queue_pairs", 4),
    "MC_MAX_WR": ("128", "max_wr", 128),
    "MC_MAX_CQE_PER_CTX": ("512", "max_cqe", 512),
    "MC_MAX_EP_PER_CTX": ("16", "max_endpoints", 16),
    "MC_MAX_MR_SIZE": ("1048576", "max_mr_size", 1 << 20),
    "MC_SLICE_SIZE": ("8192", "slice_size", 8192),
    "MC_FRAGMENT_RATIO": ("8", "fragment_ratio", 8),
    "MC_RETRY_CNT": ("2", "retries", 2),
    "MC_RDMA_RAIL_PAUSE_SECONDS": ("1.5", "rail_pause", 1.5),
    "MC_RDMA_BIND_ADDRESS": ("10.0.0.1:5", "server_name", "10.0.0.1:5"),
    "MC_TE_FILTERS": ("mlx5_0, mlx5_1", "filters", ("mlx5_0", "mlx5_1")),
    "MC_CUSTOM_TOPO_JSON": ("/a/matrix.json", "topology_file", "/a/matrix.json"),
}
# the last is off at 0 and on at all else, as with the original
TEXTS = ("MC_RDMA_BIND_ADDRESS", "MC_TE_FILTERS", "MC_CUSTOM_TOPO_JSON", "MC_IB_PCI_RELAXED_ORDERING")


def test_each_rdma_setting_has_a_variable() -> None:
    assert {name for _, name, _ in RDMA.values()} == set(RdmaSettings.__dataclass_fields__)


@pytest.mark.parametrize("variable", RDMA)
def test_rdma_variables(variable: str) -> None:
    text, name, value = RDMA[variable]
    assert getattr(RdmaSettings(), name) != value
    settings = Settings.from_env({variable: f" {text} "}).rdma
    assert settings == RdmaSettings(**{name: value})


@pytest.mark.parametrize("variable", [name for name in RDMA if name not in TEXTS])
@pytest.mark.parametrize("text", ["many", "-2", "1e30"])
def test_what_no_number_can_be(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable}="):
        Settings.from_env({variable: text})
