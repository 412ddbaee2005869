"""Shared memory between processes of one host and user: the peer's memory files are mapped, and copied from and to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mooncake_hpc.core.authentication import Authentication
from mooncake_hpc.core.errors import AuthenticationError, PeerLost, PeerSilent
from mooncake_hpc.native.compile import compile_ahead
from mooncake_hpc.transports.base import Peer, Registration, Transport
from mooncake_hpc.transports.queue import SHARED_KERNELS
from mooncake_hpc.transports.shm import handoff
from mooncake_hpc.transports.shm import kernels as shm
from mooncake_hpc.transports.shm.client import ShmRoute, dial
from mooncake_hpc.transports.shm.server import ShmServer
from mooncake_hpc.wire.descriptor import SegmentDescriptor


class ShmTransport(Transport):
    """Serves what `allocate()` made; registered memory of the caller's cannot be mapped by others."""

    name = "shm"

    def __init__(self, timeout: float, authentication: Authentication | None = None) -> None:
        """`timeout`, in seconds, is for a peer to hand over its memory when its segment is opened."""
        self._timeout = timeout
        compile_ahead(shm.lead, *SHARED_KERNELS)
        self._server = ShmServer(authentication or Authentication())

    def export(self, registrations: Sequence[Registration], *, shrinks: bool) -> None:
        self._server.export(registrations, shrinks=shrinks)

    def describe(self, descriptor: SegmentDescriptor) -> SegmentDescriptor:
        return replace(descriptor, shm_socket=self._server.address)

    def connect(self, peer: Peer) -> ShmRoute | None:
        address = peer.descriptor.shm_socket
        connection = dial(address, self._timeout) if address else None
        if connection is None:
            return None
        try:
            connection.settimeout(self._timeout)
            handoff.prove(connection, peer.expected)
            return ShmRoute(peer, connection, self._timeout)
        except AuthenticationError:
            connection.close()
            raise
        except TimeoutError as error:
            connection.close()
            raise PeerSilent(
                f"segment {peer.name!r}: its process does not hand over its shared memory within {self._timeout:g} s"
                " (MC_HANDSHAKE_CONNECT_TIMEOUT): stopped, or very busy?"
            ) from error
        except (OSError, ValueError) as error:  # MalformedRecord and RegistrationError are ValueErrors
            connection.close()
            raise PeerLost(f"segment {peer.name!r}: its shared memory cannot be mapped: {error}") from error

    def close(self) -> None:
        self._server.close()
