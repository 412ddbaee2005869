"""The one reader of the environment: `MC_*` (the original's names and meanings) and `MOONCAKE_HPC_*` (ours)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mooncake_hpc.errors import ConfigError

TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}
EPHEMERAL = range(32768, 61000)  # Linux' default ip_local_port_range: the original refuses it for RPC ports


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says. Times in seconds, sizes in bytes."""

    tcp_bind_address: str = ""  # MC_TCP_BIND_ADDRESS: the address that is published and bound
    tcp_proto: int = 2  # MC_TCP_PROTO: 1 forces unacknowledged framing
    tcp_lanes_per_peer: int = 0  # MC_TCP_LANES_PER_PEER: connections a peer; 0 = by the number of cores
    tcp_progress_timeout: float = 30.0  # MC_TCP_PROGRESS_TIMEOUT_SEC: a socket without any progress is dead
    rpc_port_min: int = 15000  # MC_MIN_RPC_PORT
    rpc_port_max: int = 17000  # MC_MAX_RPC_PORT
    legacy_rpc_port: bool = False  # MC_LEGACY_RPC_PORT_BINDING: RPC listens on the port of the segment name
    handshake_port: int = 12001  # MC_HANDSHAKE_PORT: default port of a name that has none
    handshake_backlog: int = 128  # MC_HANDSHAKE_LISTEN_BACKLOG
    handshake_connect_timeout: float = 5.0  # MC_HANDSHAKE_CONNECT_TIMEOUT
    handshake_max_length: int = 1 << 20  # MC_HANDSHAKE_MAX_LENGTH: longest RPC frame, at most 128 MiB
    use_ipv6: bool = False  # MC_USE_IPV6: prefer IPv6 where the published address is not given
    metadata_cluster_id: str = ""  # MC_METADATA_CLUSTER_ID: keys live under mooncake/<id>/
    transfer_timeout: float = 30.0  # MC_TRANSFER_TIMEOUT: default deadline of read() and write()
    lease_ttl: float = 10.0  # MOONCAKE_HPC_LEASE_TTL: a dead process's keys vanish after this
    metadata_timeout: float = 5.0  # MOONCAKE_HPC_METADATA_TIMEOUT: deadline of one metadata operation
    settle_timeout: float = 60.0  # MOONCAKE_HPC_SETTLE: ranks of a job may differ that much in starting
    etcd_user: str = ""  # MOONCAKE_HPC_ETCD_USER
    etcd_password: str = ""  # MOONCAKE_HPC_ETCD_PASSWORD
    etcd_ca: str = ""  # MOONCAKE_HPC_ETCD_CA: PEM file; switches TLS on
    etcd_cert: str = ""  # MOONCAKE_HPC_ETCD_CERT: PEM file of the client certificate
    etcd_key: str = ""  # MOONCAKE_HPC_ETCD_KEY: PEM file of its key
    etcd_binary: str = ""  # ETCD_BIN: the etcd to embed

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the environment (or `env`). Raises ConfigError that names the variable."""
        read = _Reader(os.environ if env is None else env)
        return cls(
            tcp_bind_address=read.text("MC_TCP_BIND_ADDRESS"),
            tcp_proto=1 if read.text("MC_TCP_PROTO") == "1" else 2,
            tcp_lanes_per_peer=read.integer("MC_TCP_LANES_PER_PEER", 0, 0, 16),
            tcp_progress_timeout=read.seconds("MC_TCP_PROGRESS_TIMEOUT_SEC", 30.0),
            rpc_port_min=read.port("MC_MIN_RPC_PORT", 15000),
            rpc_port_max=read.port("MC_MAX_RPC_PORT", 17000),
            legacy_rpc_port=read.boolean("MC_LEGACY_RPC_PORT_BINDING"),
            handshake_port=read.integer("MC_HANDSHAKE_PORT", 12001, 1, 65535),
            handshake_backlog=read.integer("MC_HANDSHAKE_LISTEN_BACKLOG", 128, 1, 65535),
            handshake_connect_timeout=read.seconds("MC_HANDSHAKE_CONNECT_TIMEOUT", 5.0),
            handshake_max_length=read.integer("MC_HANDSHAKE_MAX_LENGTH", 1 << 20, 1 << 10, 128 << 20),
            use_ipv6=read.boolean("MC_USE_IPV6"),
            metadata_cluster_id=read.text("MC_METADATA_CLUSTER_ID"),
            transfer_timeout=max(5.0, read.seconds("MC_TRANSFER_TIMEOUT", 30.0)),
            lease_ttl=max(1.0, read.seconds("MOONCAKE_HPC_LEASE_TTL", 10.0)),
            metadata_timeout=read.seconds("MOONCAKE_HPC_METADATA_TIMEOUT", 5.0),
            settle_timeout=read.seconds("MOONCAKE_HPC_SETTLE", 60.0),
            etcd_user=read.text("MOONCAKE_HPC_ETCD_USER"),
            etcd_password=read.text("MOONCAKE_HPC_ETCD_PASSWORD"),
            etcd_ca=read.text("MOONCAKE_HPC_ETCD_CA"),
            etcd_cert=read.text("MOONCAKE_HPC_ETCD_CERT"),
            etcd_key=read.text("MOONCAKE_HPC_ETCD_KEY"),
            etcd_binary=read.text("ETCD_BIN"),
        )


class _Reader:
    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env

    def text(self, name: str) -> str:
        return self.env.get(name, "").strip()

    def boolean(self, name: str) -> bool:
        value = self.text(name).lower()
        if value in TRUE:
            return True
        if value in FALSE:
            return False
        raise ConfigError(f"{name}={value!r}: expected one of {sorted(TRUE | FALSE - {''})}")

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        text = self.text(name)
        try:
            value = int(text) if text else default
        except ValueError:
            raise ConfigError(f"{name}={text!r} is not an integer") from None
        if not low <= value <= high:
            raise ConfigError(f"{name}={value} is outside {low} to {high}")
        return value

    def port(self, name: str, default: int) -> int:
        value = self.integer(name, default, 1, 65535)
        if value in EPHEMERAL:
            raise ConfigError(f"{name}={value} lies among the ephemeral ports {EPHEMERAL.start}-{EPHEMERAL.stop - 1}")
        return value

    def seconds(self, name: str, default: float) -> float:
        text = self.text(name)
        try:
            value = float(text) if text else default
        except ValueError:
            raise ConfigError(f"{name}={text!r} is not a number of seconds") from None
        if not 0 < value < 1e6:
            raise ConfigError(f"{name}={value} must be above 0 and below 1e6 seconds")
        return value
