"""Which transport a command line means. An explicit `--protocol` is never replaced by another."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mooncake_hpc.errors import ConfigError

PROTOCOLS = ("rdma", "tcp", "shm", "auto")
INFINIBAND = Path("/sys/class/infiniband")


def rdma_devices(folder: Path = INFINIBAND) -> list[str]:
    """RDMA devices of this machine by name, from sysfs."""
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def choose(
    protocol: str, named: Collection[str], device_name: str, auto_discovery: bool, devices: Collection[str]
) -> tuple[str, str]:
    """The engine's protocol, and a notice for stderr ("" for none).

    `named` are the flags that the user gave, `devices` those of this machine. Raises ConfigError where RDMA is
    asked for, by protocol, device or matrix, and cannot be had.
    """
    explicit = "protocol" in named
    if explicit and protocol != "rdma":
        return protocol, ""
    wanted = [name for name in device_name.split(",") if name]
    missing = [name for name in wanted if name not in devices]
    exists = f"{INFINIBAND} has {', '.join(devices) or 'no device'}"
    if missing:
        raise ConfigError(f"--device_name={device_name}: no RDMA device {', '.join(missing)}; {exists}")
    if auto_discovery and not explicit:
        return "auto", ""
    asked = explicit or bool(wanted) or "nic_priority_matrix" in named
    if asked:
        if not devices:
            raise ConfigError(f"RDMA is asked for, but {exists}; say --protocol=tcp for TCP")
        raise ConfigError(f"the RDMA transport is not part of this version ({exists}); say --protocol=tcp for TCP")
    return "tcp", f"no --protocol and no RDMA device named ({exists}): using tcp"
