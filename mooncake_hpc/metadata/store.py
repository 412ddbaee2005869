"""From what the user writes, `host:port`, `etcd://a:1,b:2` or `memory://NAME`, to the store that it names."""

from __future__ import annotations

import re

from mooncake_hpc.core.address import P2PHANDSHAKE
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.metadata.base import MetadataStore

ACCEPTED = (
    "host:port or etcd://host:port[,host:port...] (IPv6 as [::1]:2379), memory://NAME (within one process), "
    "P2PHANDSHAKE (no store) or embedded (starts an etcd)"
)
ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.]+(%\w+)?\]|[^\s:/\[\]@,]+):(\d{1,5})")


def open_store(spec: str, settings: Settings | None = None) -> MetadataStore:
    """Open the store that `spec` names; `settings` default to the environment's. No connection is made yet.

    ConfigError says what is accepted. P2PHANDSHAKE and embedded are no stores: whoever calls handles them.
    """
    scheme, separator, rest = spec.strip().partition("://")
    if not separator:
        scheme, rest = "etcd", scheme
    if scheme == "memory" and rest:
        from mooncake_hpc.metadata.memory import MemoryStore

        return MemoryStore(rest)
    if scheme in ("http", "https"):
        raise ConfigError(f"metadata server {spec!r}: HTTP metadata servers are not supported, use etcd: {ACCEPTED}")
    if spec.strip() in (P2PHANDSHAKE, "embedded"):
        raise ConfigError(f"metadata server {spec!r} names no store to look into: give host:port or etcd://host:port")
    if scheme != "etcd":
        raise ConfigError(f"metadata server {spec!r}: expected {ACCEPTED}")
    endpoints = parse_endpoints(rest)
    from mooncake_hpc.metadata.etcd import EtcdStore

    return EtcdStore(endpoints, settings or Settings.from_env())


def parse_endpoints(text: str) -> list[str]:
    """The endpoints in "host:port[,host:port...]". ConfigError names the one that is none."""
    endpoints = [part.strip() for part in text.split(",")]
    for endpoint in endpoints:
        match = ENDPOINT.fullmatch(endpoint)
        if match is None or not 0 < int(match[3]) < 65536:
            where = f"{text!r}, there {endpoint!r}" if endpoint != text else f"{text!r}"
            raise ConfigError(f"metadata server {where}: expected {ACCEPTED}")
    return endpoints
