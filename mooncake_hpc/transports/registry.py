"""Which transports a protocol name stands for. A transport is imported when it is first asked for."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from mooncake_hpc.core.authentication import Authentication
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.base import Transport
from mooncake_hpc.transports.choice import PROTOCOLS
from mooncake_hpc.transports.rdma import topology


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """Which RDMA devices to use: named ones (`a,b`), those of a priority matrix in a file, else what is found."""

    names: str = ""
    matrix_file: str = ""
    discover: bool = False  # with the protocol `auto`: use those that are found, if any

    @property
    def explicit(self) -> bool:
        return bool(self.names or self.matrix_file)


def make_transports(
    protocol: str,
    listener: socket.socket,
    host: str,
    settings: Settings,
    devices: DeviceChoice,
    authentication: Authentication,
) -> list[Transport]:
    """The transports of `protocol`, the preferred first; they own `listener`. Raises ConfigError, DeviceError."""
    if protocol not in PROTOCOLS:
        listener.close()
        raise ConfigError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    made: list[Transport] = []
    if protocol in ("shm", "auto"):
        from mooncake_hpc.transports.shm import ShmTransport

        made.append(ShmTransport(settings.handshake_connect_timeout, authentication))
    try:
        if protocol == "rdma" or (protocol == "auto" and _has_rdma(devices, settings)):
            made.append(_rdma(devices, settings))
    except BaseException:
        listener.close()
        for transport in made:
            transport.close()
        raise
    if protocol in ("shm", "rdma"):
        listener.close()
    else:
        from mooncake_hpc.transports.tcp import TcpTransport

        made.append(TcpTransport(listener, host, settings, authentication))
    return made


def _has_rdma(devices: DeviceChoice, settings: Settings) -> bool:
    """Whether the protocol `auto` takes RDMA: its devices are named, or to be found and there are some."""
    if devices.explicit or settings.force_rdma:
        return True
    return devices.discover and not settings.force_tcp and bool(topology.load("", "", settings).devices)


def _rdma(devices: DeviceChoice, settings: Settings) -> Transport:
    chosen = topology.load(devices.names, devices.matrix_file, settings)
    try:
        from mooncake_hpc.transports.rdma.transport import RdmaTransport
    except ImportError as error:
        raise ConfigError(
            f"rdma needs pyverbs, which does not load ({error}): launch/setup-rdma makes it work"
        ) from error
    return RdmaTransport(chosen, settings)
