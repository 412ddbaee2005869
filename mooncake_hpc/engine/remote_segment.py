"""A remote segment: its descriptor, its generation, and the routes that reach it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_hpc.control import client
from mooncake_hpc.control.directory import Directory
from mooncake_hpc.core import process
from mooncake_hpc.core.authentication import Authentication, Expected
from mooncake_hpc.core.errors import (
    AuthenticationError,
    MalformedRecord,
    MetadataError,
    MetadataUnavailable,
    PeerLost,
    SegmentNotFound,
)
from mooncake_hpc.core.interrupt import Interrupt, Interrupted
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.base import Route, Transport
from mooncake_hpc.wire.descriptor import BufferDescriptor, SegmentDescriptor
from mooncake_hpc.wire.rpc_frames import Kind

PROBE_TIMEOUT = 2.0  # seconds for a peer to say that it still is the same process


class Segment:
    """What `TransferEngine.open_segment` returns. `id` is the `target_id` of requests to it."""

    def __init__(
        self,
        number: int,
        name: str,
        directory: Directory,
        settings: Settings,
        authentication: Authentication | None = None,
    ) -> None:
        self._process = process.here
        self.id = number
        self.name = name
        self.routes: list[Route] = []
        self.interrupt = Interrupt()  # set when it is closed
        self._directory = directory
        self._settings = settings
        self._authentication = authentication or Authentication()
        self._lock = threading.Lock()
        self._descriptor = directory.lookup(name)
        self._rpc_address = directory.rpc_address(name)
        self._endpoint = directory.data_endpoint(self._descriptor)

    def connect(self, transports: Sequence[Transport]) -> None:
        """Make a route of each transport that the peer offers, the best first. Raises PeerLost if there is none."""
        process.check(self)
        refused: AuthenticationError | None = None
        for transport in transports:
            try:
                route = transport.connect(self)
            except AuthenticationError as error:  # elsewhere the peer's address may be allowed to do without
                refused = error
                continue
            if route is not None:
                self.routes.append(route)
        if not self.routes:
            if refused is not None:
                raise refused
            names = ", ".join(transport.name for transport in transports)
            spoken = self._descriptor.spoken
            raise PeerLost(f"segment {self.name!r} cannot be reached by {names}: it speaks {spoken}")

    @property
    def buffers(self) -> tuple[BufferDescriptor, ...]:
        """Its registered buffers, as last read."""
        process.check(self)
        return self._descriptor.buffers

    @property
    def transport(self) -> str:
        """Names of the transports that reach it, the preferred first: `tcp`, `shm+tcp`."""
        process.check(self)
        return "+".join(route.transport for route in self.routes)

    @property
    def descriptor(self) -> SegmentDescriptor:
        process.check(self)
        return self._descriptor

    def endpoint(self) -> tuple[str, int]:
        process.check(self)
        return self._endpoint

    @property
    def expected(self) -> Expected:
        """Who has to prove to be the peer."""
        process.check(self)
        return self._authentication.expect(self._descriptor.name, self._descriptor.generation)

    def refresh(self) -> SegmentDescriptor:
        """Read the descriptor again. Raises PeerLost when its process was replaced or is gone."""
        process.check(self)
        with self._lock:
            try:
                newest = self.interrupt.call(lambda: self._directory.lookup(self.name))
            except Interrupted as error:
                raise PeerLost(f"segment {self.name!r} is closed") from error
            except SegmentNotFound as error:
                if not self._lives_unpublished():
                    raise PeerLost(f"segment {self.name!r} is gone: {error}") from error
                return self._descriptor
            except (MetadataUnavailable, MalformedRecord):  # whatever stands there now, it is not what the peer wrote
                self._probe_same()
                return self._descriptor
            if newest.generation != self._descriptor.generation:
                raise PeerLost(f"segment {self.name!r} now belongs to another process: open it again")
            self._descriptor = newest
            self._endpoint = self._directory.data_endpoint(newest)
        for route in self.routes:
            route.update(newest)
        return newest

    def fence(self, connection: str, timeout: float) -> bool:
        process.check(self)
        reply = client.probe(
            self._rpc_address, timeout + 1.0, self._settings, connection, timeout, self.expected, self.interrupt
        )
        if reply.generation != self._descriptor.generation:
            raise PeerLost(f"segment {self.name!r}: another process answers at {self._rpc_address}")
        return reply.fenced

    def handshake(self, request: dict[str, Any], timeout: float) -> str:
        process.check(self)
        return client.exchange(
            self._rpc_address, Kind.CONNECTION, request, timeout, self._settings, self.expected, self.interrupt
        )

    def replaced(self) -> bool:
        """Whether the name now belongs to another process, or to none."""
        process.check(self)
        try:
            return self._directory.lookup(self.name).generation != self._descriptor.generation
        except MetadataUnavailable:
            return False
        except SegmentNotFound:
            return not self._lives_unpublished()
        except MalformedRecord:  # the peer has not written that
            return not self._answers()
        except MetadataError:
            return True

    def _answers(self) -> bool:
        """Whether the peer says that it is the same process."""
        try:
            self._probe_same()
        except PeerLost:
            return False
        return True

    def notify(self, sender: str, text: str) -> None:
        """Hand it a text. Raises PeerLost, TransferError."""
        process.check(self)
        timeout = self._settings.metadata_timeout
        client.notify(self._rpc_address, sender, text, timeout, self._settings, self.expected)

    def mapped(self, address: int, nbytes: int) -> npt.NDArray[np.uint8] | None:
        """These bytes of the peer's memory in place, read-only: what it writes is seen. None where this process cannot
        map them: the peer is on another host, or they are not (any more) registered memory that it allocated.

        They stay mapped as long as the array is held, whatever the peer does.
        """
        process.check(self)
        found = (route.mapped(address, nbytes) for route in self.routes)
        return next((array for array in found if array is not None), None)

    def stop(self, cause: str) -> None:
        """End all waits for the peer, fail all transfers as lost, with this cause, and return at once. Idempotent."""
        process.check(self)
        self.interrupt.set()
        for route in self.routes:
            route.stop(cause)

    def close(self, cause: str) -> None:
        """End it, and with it all transfers, as `stop`. Idempotent. Nothing happens in a forked child."""
        if self._process is not process.here:
            return
        self.stop(cause)
        for route in self.routes:
            route.close(cause)

    def _lives_unpublished(self) -> bool:
        """Whether the process of a name that nobody publishes is the same as before. Its keys come back: etcd before
        3.4.30 and 3.5.13 may revoke living leases when a leader that was stopped goes on (its issue 15247)."""
        return not self._directory.peer_to_peer and self._answers()

    def _probe_same(self) -> None:
        """Without a metadata store, the peer itself says whether it is the same process."""
        reply = client.probe(
            self._rpc_address, PROBE_TIMEOUT, self._settings, expected=self.expected, interrupt=self.interrupt
        )
        if reply.generation != self._descriptor.generation:
            raise PeerLost(f"segment {self.name!r}: another process answers at {self._rpc_address}")
