"""Which transports a protocol name stands for. A transport is imported when it is first asked for."""

from __future__ import annotations

import socket

from mooncake_hpc.errors import ConfigError
from mooncake_hpc.settings import Settings
from mooncake_hpc.transports.base import Transport

PROTOCOLS = ("tcp", "shm", "auto")


def make_transports(protocol: str, listener: socket.socket, host: str, settings: Settings) -> list[Transport]:
    """The transports of `protocol`, the preferred first; they own `listener`. Raises ConfigError."""
    if protocol not in PROTOCOLS:
        listener.close()
        raise ConfigError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    made: list[Transport] = []
    if protocol in ("shm", "auto"):
        from mooncake_hpc.transports.shm import ShmTransport

        made.append(ShmTransport())
    if protocol == "shm":
        listener.close()
    else:
        from mooncake_hpc.transports.tcp import TcpTransport

        made.append(TcpTransport(listener, host, settings))
    return made
