"""Which transport a command line means. An explicit `--protocol` is never replaced by another."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.rdma import topology
from mooncake_hpc.transports.rdma.topology import SYSFS, Device

PROTOCOLS = ("rdma", "tcp", "shm", "auto")
INFINIBAND = SYSFS / "class/infiniband"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a command line says of the transport; `named` are the flags that the user gave."""

    protocol: str
    device_name: str = ""
    nic_priority_matrix: str = ""
    auto_discovery: bool = False
    named: Collection[str] = ()

    @property
    def devices(self) -> list[str]:
        return [name for word in self.device_name.split(",") if (name := word.strip())]


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine's protocol, what of the RDMA flags it is to see, and a notice for stderr ("" for none)."""

    protocol: str
    device_name: str = ""
    nic_priority_matrix: str = ""
    auto_discovery: bool = False
    notice: str = ""

    def as_config(self) -> dict[str, Any]:
        """The fields of a run's configuration that it decides."""
        return {name: value for name, value in asdict(self).items() if name != "notice"}


def engine_options(protocol: str, device_name: str, nic_priority_matrix: str, auto_discovery: bool) -> dict[str, Any]:
    """The arguments of TransferEngine that say what carries the bytes; those of RDMA only where it may."""
    if protocol in ("tcp", "shm"):
        return {"protocol": protocol}
    names = {"device_name": device_name, "nic_priority_matrix": nic_priority_matrix}
    return {"protocol": protocol, **names, "auto_discovery": auto_discovery}


def choose_here(asked: Asked, settings: Settings) -> Choice:
    """What the command line means on this machine. Raises ConfigError as `choose`, and for a matrix file that cannot be
    read, is none, or names devices that are not here."""
    choice = choose(asked, topology.devices())
    if choice.protocol == "rdma" or choice.device_name or choice.nic_priority_matrix:
        topology.load(choice.device_name, choice.nic_priority_matrix, settings)
    return choice


def choose(asked: Asked, devices: Sequence[Device]) -> Choice:
    """What the command line means on a machine with these RDMA devices.

    Without --protocol it is RDMA where a device or matrix is named, or a device can be used; else tcp, with a notice;
    and auto with --auto_discovery, or where that is the command's default. Raises ConfigError where RDMA is asked
    for, by protocol, device or matrix, and cannot be had.
    """
    explicit = "protocol" in asked.named
    if explicit and asked.protocol in ("tcp", "shm"):
        return Choice(asked.protocol)
    if explicit and asked.protocol == "auto":
        return _automatic(asked, devices)
    _check_devices(asked, devices)
    if asked.auto_discovery and not explicit:
        return _automatic(asked, devices)
    usable = [device for device in devices if not device.problem]
    if explicit or asked.devices or asked.nic_priority_matrix:
        if not usable:
            raise ConfigError(f"RDMA is asked for, but {_exists(devices)}; say --protocol=tcp for TCP")
        return Choice("rdma", asked.device_name, asked.nic_priority_matrix, asked.auto_discovery)
    if asked.protocol != "rdma":
        return Choice(asked.protocol)
    if usable:
        return Choice("rdma")
    return Choice("tcp", notice=f"no --protocol and no RDMA device named ({_exists(devices)}): using tcp")


def _automatic(asked: Asked, devices: Sequence[Device]) -> Choice:
    """Of the named devices those that can be used: where none can, auto has other transports."""
    usable = [device.name for device in devices if not device.problem]
    present = [name for name in asked.devices if name in usable]
    notice = ""
    if len(present) < len(asked.devices):
        notice = f"--device_name={asked.device_name}: {_exists(devices)}; the others are left out"
    matrix = asked.nic_priority_matrix if usable else ""
    return Choice("auto", ",".join(present), matrix, asked.auto_discovery and bool(usable), notice)


def _check_devices(asked: Asked, devices: Sequence[Device]) -> None:
    """Raise ConfigError for a device of --device_name that is not there or cannot be used."""
    known = {device.name: device for device in devices}
    missing = [name for name in asked.devices if name not in known]
    if missing:
        raise ConfigError(f"--device_name={asked.device_name}: no RDMA device {', '.join(missing)}; {_exists(devices)}")
    broken = [f"{name}: {known[name].problem}" for name in asked.devices if known[name].problem]
    if broken:
        raise ConfigError(f"--device_name={asked.device_name}: cannot be used: {'; '.join(broken)}")


def _exists(devices: Sequence[Device]) -> str:
    texts = [f"{device.name} ({device.problem})" if device.problem else device.name for device in devices]
    return f"{INFINIBAND} has {', '.join(texts) or 'no device'}"
