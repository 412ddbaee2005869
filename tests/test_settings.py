"""What the environment says: values, limits, and errors that name the variable."""

from __future__ import annotations

from typing import Any

import pytest

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings


def test_an_empty_environment_means_the_defaults() -> None:
    assert Settings.from_env({}) == Settings()
    assert Settings.from_env({"MC_TCP_BIND_ADDRESS": " ", "MC_USE_IPV6": "", "MC_MIN_RPC_PORT": ""}) == Settings()


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("MC_TCP_BIND_ADDRESS", "10.0.0.1", "tcp_bind_address", "10.0.0.1"),
        ("MC_TCP_PROTO", "1", "tcp_proto", 1),
        ("MC_TCP_LANES_PER_PEER", "3", "tcp_lanes_per_peer", 3),
        ("MC_TCP_PROGRESS_TIMEOUT_SEC", "0.5", "tcp_progress_timeout", 0.5),
        ("MC_MIN_RPC_PORT", "12000", "rpc_port_min", 12000),
        ("MC_MAX_RPC_PORT", "18000", "rpc_port_max", 18000),
        ("MC_LEGACY_RPC_PORT_BINDING", "1", "legacy_rpc_port", True),
        ("MC_HANDSHAKE_PORT", "13001", "handshake_port", 13001),
        ("MC_HANDSHAKE_LISTEN_BACKLOG", "7", "handshake_backlog", 7),
        ("MC_HANDSHAKE_CONNECT_TIMEOUT", "2", "handshake_connect_timeout", 2.0),
        ("MC_HANDSHAKE_MAX_LENGTH", "2048", "handshake_max_length", 2048),
        ("MC_USE_IPV6", "on", "use_ipv6", True),
        ("MC_METADATA_CLUSTER_ID", "blue", "metadata_cluster_id", "blue"),
        ("MC_TRANSFER_TIMEOUT", "60", "transfer_timeout", 60.0),
        ("MC_TRANSFER_TIMEOUT", "1", "transfer_timeout", 5.0),
        ("MOONCAKE_HPC_LEASE_TTL", "0.1", "lease_ttl", 1.0),
        ("MOONCAKE_HPC_METADATA_TIMEOUT", "2.5", "metadata_timeout", 2.5),
        ("MOONCAKE_HPC_SETTLE", "9", "settle_timeout", 9.0),
        ("MC_FORCE_TCP", "true", "force_tcp", True),
        ("MC_FORCE_HCA", "0", "force_rdma", False),
    ],
)
def test_each_variable_is_read(name: str, text: str, field: str, value: Any) -> None:
    assert getattr(Settings.from_env({name: text}), field) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("MC_TCP_PROTO", "3", "outside 1 to 2"),
        ("MC_MIN_RPC_PORT", "x", "not an integer"),
        ("MC_MAX_RPC_PORT", "40000", "ephemeral ports"),
        ("MC_TCP_LANES_PER_PEER", "17", "outside 0 to 16"),
        ("MC_TRANSFER_TIMEOUT", "0", "above 0"),
        ("MC_TCP_PROGRESS_TIMEOUT_SEC", "nan", "above 0"),
        ("MC_HANDSHAKE_CONNECT_TIMEOUT", "soon", "not a number of seconds"),
        ("MC_USE_IPV6", "maybe", "expected one of"),
    ],
)
def test_an_impossible_value_is_an_error_that_names_the_variable(name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=.*{message}"):
        Settings.from_env({name: text})
