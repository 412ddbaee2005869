"""The original's TCP data protocol, in both roles."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace

from mooncake_hpc.core.authentication import Authentication
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.native.compile import compile_ahead
from mooncake_hpc.transports import recut_kernels as recut
from mooncake_hpc.transports.base import Peer, Registration, Transport
from mooncake_hpc.transports.queue import SHARED_KERNELS
from mooncake_hpc.transports.tcp import accept_kernels as tcp_accept
from mooncake_hpc.transports.tcp import client_kernels as tcp_client
from mooncake_hpc.transports.tcp import pipeline_kernels as tcp_lists
from mooncake_hpc.transports.tcp.client import TcpRoute
from mooncake_hpc.transports.tcp.server import TcpServer
from mooncake_hpc.wire.descriptor import SegmentDescriptor

CLIENT_KERNELS = tcp_client.lead, *tcp_lists.KERNELS, *recut.KERNELS


class TcpTransport(Transport):
    """Serves our registrations on `listener`, published as `host`."""

    name = "tcp"

    def __init__(
        self, listener: socket.socket, host: str, settings: Settings, authentication: Authentication | None = None
    ) -> None:
        self._settings = settings
        self._host = host
        compile_ahead(*tcp_accept.KERNELS, *CLIENT_KERNELS, *SHARED_KERNELS)
        self.server = TcpServer(listener, settings.tcp_progress_timeout, authentication)

    def export(self, registrations: Sequence[Registration], *, shrinks: bool) -> None:
        self.server.export(registrations, shrinks=shrinks)

    def describe(self, descriptor: SegmentDescriptor) -> SegmentDescriptor:
        return replace(
            descriptor,
            tcp_data_host=self._host,
            tcp_data_port=self.server.port,
            tcp_proto_version=self._settings.tcp_proto,
        )

    def connect(self, peer: Peer) -> TcpRoute | None:
        if peer.descriptor.devices and not peer.descriptor.tcp_data_port:
            return None  # RDMA alone; the oldest originals publish no port for tcp either, but no device
        return TcpRoute(peer, self._settings)

    def fence(self, connection: str, timeout: float) -> bool:
        return self.server.fence(connection, timeout)

    def close(self) -> None:
        self.server.close()
