"""The one reader of the environment: `MC_*` (the original's names and meanings) and `MOONCAKE_HPC_*` (ours)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.names import check_unicode
from mooncake_hpc.core.private_file import read_private

TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}
PASSWORD_LIMIT = 1024  # bytes
EPHEMERAL = range(32768, 61000)  # Linux' default ip_local_port_range: the original refuses it for RPC ports


@dataclass(frozen=True, slots=True)
class RdmaSettings:
    """What the environment says about RDMA. Sizes in bytes, times in seconds."""

    gid_index: int | None = None  # MC_GID_INDEX, else NCCL_IB_GID_INDEX; None: the best one of the port
    gid_retries: int = 2  # MC_AUTO_GID_MAX_RETRIES: other GIDs to try where the chosen one does not connect
    port: int = 1  # MC_IB_PORT
    mtu: int = 4096  # MC_MTU: at most this path MTU
    traffic_class: int = 0  # MC_IB_TC
    service_level: int = 0  # MC_IB_SL
    pkey_index: int = 0  # MC_PKEY_INDEX
    relaxed_ordering: bool = True  # MC_IB_PCI_RELAXED_ORDERING
    queue_pairs: int = 2  # MC_NUM_QP_PER_EP: queue pairs an endpoint
    max_wr: int = 256  # MC_MAX_WR: work requests in flight a queue pair
    max_cqe: int = 4096  # MC_MAX_CQE_PER_CTX
    max_endpoints: int = 65536  # MC_MAX_EP_PER_CTX: endpoints a device
    max_mr_size: int = 1 << 40  # MC_MAX_MR_SIZE: larger memory is registered in several regions
    slice_size: int = 65536  # MC_SLICE_SIZE
    fragment_ratio: int = 4  # MC_FRAGMENT_RATIO: a tail of slice_size/this is merged into the slice before
    retries: int = 9  # MC_RETRY_CNT: a slice that failed so often fails its request
    rail_pause: float = 30.0  # MC_RDMA_RAIL_PAUSE_SECONDS: a path that failed is left alone for this long
    server_name: str = ""  # MC_RDMA_BIND_ADDRESS: another server name in NIC paths
    filters: tuple[str, ...] = ()  # MC_TE_FILTERS: the only devices that discovery may find; empty: all
    topology_file: str = ""  # MC_CUSTOM_TOPO_JSON: a NIC priority matrix instead of discovery


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
    handshake_backlog: int = 4096  # MC_HANDSHAKE_LISTEN_BACKLOG
    handshake_connect_timeout: float = 5.0  # MC_HANDSHAKE_CONNECT_TIMEOUT
    handshake_max_length: int = 1 << 20  # MC_HANDSHAKE_MAX_LENGTH: longest RPC frame, at most 128 MiB
    use_ipv6: bool = False  # MC_USE_IPV6: prefer IPv6 where the published address is not given
    metadata_cluster_id: str = ""  # MC_METADATA_CLUSTER_ID: keys live under mooncake/<id>/
    transfer_timeout: float = 30.0  # MC_TRANSFER_TIMEOUT: default deadline of read() and write(), 5 at least
    lease_ttl: float = 10.0  # MOONCAKE_HPC_LEASE_TTL: a dead process's keys vanish after this, 1 at least
    metadata_timeout: float = 5.0  # MOONCAKE_HPC_METADATA_TIMEOUT: deadline of one metadata operation
    settle_timeout: float = 60.0  # MOONCAKE_HPC_SETTLE: ranks of a job may differ that much in starting
    etcd_user: str = ""  # MOONCAKE_HPC_ETCD_USER
    etcd_password: str = field(default="", repr=False)  # MOONCAKE_HPC_ETCD_PASSWORD, or what the next one holds
    etcd_password_file: str = ""  # MOONCAKE_HPC_ETCD_PASSWORD_FILE: of mode 0600
    etcd_ca: str = ""  # MOONCAKE_HPC_ETCD_CA: PEM file; switches TLS on
    etcd_cert: str = ""  # MOONCAKE_HPC_ETCD_CERT: PEM file of the client certificate
    etcd_key: str = ""  # MOONCAKE_HPC_ETCD_KEY: PEM file of its key
    etcd_binary: str = ""  # ETCD_BIN: the etcd to embed
    secret_file: str = ""  # MOONCAKE_HPC_SECRET_FILE: peers prove that they know what it holds
    allow_unauthenticated: str = ""  # MOONCAKE_HPC_ALLOW_UNAUTHENTICATED: addresses of peers that need not
    force_tcp: bool = False  # MC_FORCE_TCP: automatic choice never takes RDMA
    force_rdma: bool = False  # MC_FORCE_HCA: automatic choice takes RDMA or fails
    rdma: RdmaSettings = field(default_factory=RdmaSettings)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the environment (or `env`). Raises ConfigError that names the variable."""
        read = _Reader(os.environ if env is None else env)
        return cls(
            tcp_bind_address=read.text("MC_TCP_BIND_ADDRESS"),
            tcp_proto=read.integer("MC_TCP_PROTO", 2, 1, 2),
            tcp_lanes_per_peer=read.integer("MC_TCP_LANES_PER_PEER", 0, 0, 16),
            tcp_progress_timeout=read.seconds("MC_TCP_PROGRESS_TIMEOUT_SEC", 30.0),
            rpc_port_min=read.port("MC_MIN_RPC_PORT", 15000),
            rpc_port_max=read.port("MC_MAX_RPC_PORT", 17000),
            legacy_rpc_port=read.boolean("MC_LEGACY_RPC_PORT_BINDING"),
            handshake_port=read.integer("MC_HANDSHAKE_PORT", 12001, 1, 65535),
            handshake_backlog=read.integer("MC_HANDSHAKE_LISTEN_BACKLOG", 4096, 1, 65535),
            handshake_connect_timeout=read.seconds("MC_HANDSHAKE_CONNECT_TIMEOUT", 5.0),
            handshake_max_length=read.integer("MC_HANDSHAKE_MAX_LENGTH", 1 << 20, 1 << 10, 128 << 20),
            use_ipv6=read.boolean("MC_USE_IPV6"),
            metadata_cluster_id=read.text("MC_METADATA_CLUSTER_ID"),
            transfer_timeout=max(5.0, read.seconds("MC_TRANSFER_TIMEOUT", 30.0)),
            lease_ttl=max(1.0, read.seconds("MOONCAKE_HPC_LEASE_TTL", 10.0)),
            metadata_timeout=read.seconds("MOONCAKE_HPC_METADATA_TIMEOUT", 5.0),
            settle_timeout=read.seconds("MOONCAKE_HPC_SETTLE", 60.0),
            etcd_user=read.text("MOONCAKE_HPC_ETCD_USER"),
            etcd_password=_password(read),
            etcd_password_file=read.text("MOONCAKE_HPC_ETCD_PASSWORD_FILE"),
            etcd_ca=read.text("MOONCAKE_HPC_ETCD_CA"),
            etcd_cert=read.text("MOONCAKE_HPC_ETCD_CERT"),
            etcd_key=read.text("MOONCAKE_HPC_ETCD_KEY"),
            etcd_binary=read.text("ETCD_BIN"),
            secret_file=read.text("MOONCAKE_HPC_SECRET_FILE"),
            allow_unauthenticated=read.text("MOONCAKE_HPC_ALLOW_UNAUTHENTICATED"),
            force_tcp=read.boolean("MC_FORCE_TCP"),
            force_rdma=read.boolean("MC_FORCE_HCA"),
            rdma=_rdma(read),
        )


def _password(read: _Reader) -> str:
    """etcd's password, which is not shown by any error."""
    path, password = read.text("MOONCAKE_HPC_ETCD_PASSWORD_FILE"), read.text("MOONCAKE_HPC_ETCD_PASSWORD")
    if not path:
        return password
    if password:
        raise ConfigError("MOONCAKE_HPC_ETCD_PASSWORD and MOONCAKE_HPC_ETCD_PASSWORD_FILE are both set: unset one")
    where = f"the file {path!r} (MOONCAKE_HPC_ETCD_PASSWORD_FILE)"
    content = read_private(path, where, PASSWORD_LIMIT)
    if not 0 < len(content) <= PASSWORD_LIMIT:
        raise ConfigError(f"{where} must hold 1 to {PASSWORD_LIMIT} bytes, without a last newline")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not UTF-8") from None


class _Reader:
    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env

    def text(self, name: str) -> str:
        value = self.env.get(name, "").strip()
        check_unicode(value, name)
        return value

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

    def optional(self, name: str, low: int, high: int) -> int | None:
        return self.integer(name, low, low, high) if self.text(name) else None

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


def _rdma(read: _Reader) -> RdmaSettings:
    gid = read.optional("MC_GID_INDEX", 0, 65535)
    return RdmaSettings(
        gid_index=read.optional("NCCL_IB_GID_INDEX", 0, 65535) if gid is None else gid,
        gid_retries=read.integer("MC_AUTO_GID_MAX_RETRIES", 2, 0, 64),
        port=read.integer("MC_IB_PORT", 1, 1, 255),
        mtu=_mtu(read.integer("MC_MTU", 4096, 256, 65536)),
        # the original's default, -1, leaves both at 0
        traffic_class=max(0, read.integer("MC_IB_TC", 0, -1, 255)),
        service_level=max(0, read.integer("MC_IB_SL", 0, -1, 15)),
        pkey_index=read.integer("MC_PKEY_INDEX", 0, 0, 65535),
        relaxed_ordering=read.text("MC_IB_PCI_RELAXED_ORDERING") != "0",
        queue_pairs=read.integer("MC_NUM_QP_PER_EP", 2, 1, 256),
        max_wr=read.integer("MC_MAX_WR", 256, 1, 65535),
        max_cqe=read.integer("MC_MAX_CQE_PER_CTX", 4096, 1, 1 << 22),
        max_endpoints=read.integer("MC_MAX_EP_PER_CTX", 65536, 1, 1 << 20),
        max_mr_size=read.integer("MC_MAX_MR_SIZE", 1 << 40, 1 << 12, 1 << 62),
        slice_size=read.integer("MC_SLICE_SIZE", 65536, 1 << 10, 1 << 30),
        fragment_ratio=read.integer("MC_FRAGMENT_RATIO", 4, 1, 1 << 20),
        retries=read.integer("MC_RETRY_CNT", 9, 0, 1000),
        rail_pause=read.seconds("MC_RDMA_RAIL_PAUSE_SECONDS", 30.0),
        server_name=read.text("MC_RDMA_BIND_ADDRESS"),
        filters=tuple(name for word in read.text("MC_TE_FILTERS").split(",") if (name := word.strip())),
        topology_file=read.text("MC_CUSTOM_TOPO_JSON"),
    )


def _mtu(value: int) -> int:
    """The path MTU that verbs has at or below `value`: 256, 512, 1024, 2048 or 4096."""
    return min(4096, 1 << (value.bit_length() - 1))
