"""All endpoints of this process: made by the handshake in both roles, at most MC_MAX_EP_PER_CTX a device."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mooncake_hpc.core.errors import DeviceError, MalformedRecord, MooncakeError, PeerLost
from mooncake_hpc.core.settings import RdmaSettings
from mooncake_hpc.transports.base import Peer
from mooncake_hpc.transports.rdma.endpoint import READY_TIMEOUT, Endpoint
from mooncake_hpc.transports.rdma.gid import Gid
from mooncake_hpc.transports.rdma.nic import Nic
from mooncake_hpc.transports.rdma.sieve import Sieve
from mooncake_hpc.wire.descriptor import SegmentDescriptor
from mooncake_hpc.wire.rdma_handshake import LONGEST_ERROR, Hello

log = logging.getLogger(__name__)

UNCONFIRMED_LIFE_S = 60.0  # above the time that both exchanges of a handshake may take
ATTEMPTS = 4  # handshakes for one endpoint: the peer may be at the same at the same time

CONFIRMATION_INTERVAL = 0.05  # seconds between two looks whether its owner closes, while a confirmation is awaited


class Refused(PeerLost):
    """The peer's answer to a handshake says why it cannot be."""


class Pool:
    """Thread-safe. No lock is held while a peer is asked: a slow one keeps nobody else waiting."""

    def __init__(self, nics: Sequence[Nic], settings: RdmaSettings, gid_changed: Callable[[], None]) -> None:
        self._nics = nics
        self._settings = settings
        self._gid_changed = gid_changed
        self._lock = threading.Lock()
        self._known: list[Sieve[str, Endpoint]] = [Sieve(_used) for _ in nics]  # by device; by the peer's path
        self._closed = False
        self.server = ""  # the first half of our NIC paths
        self.lookup: Callable[[str], SegmentDescriptor] | None = None  # of any segment

    # --- active ---------------------------------------------------------------------------------------------

    def open(self, nic: Nic, peer: Peer, device: str, timeout: float) -> Endpoint:
        """An endpoint from `nic` to the peer's device, connected and confirmed within `timeout` seconds.

        Raises PeerLost, DeviceError.
        """
        deadline = time.monotonic() + timeout
        path = f"{peer.descriptor.nic_server}@{device}"
        gids = nic.gids()
        for _ in range(ATTEMPTS + self._settings.gid_retries):
            endpoint = self._obtain(nic, gids[0], path)
            try:
                if self._connected(endpoint, peer, device, deadline):
                    return endpoint
            except BaseException as error:
                if not endpoint.connected:
                    self.discard(endpoint)
                if not _other_gid(endpoint, error, gids):
                    raise
            else:
                self.discard(endpoint)
        raise PeerLost(f"{path}: no agreement on queue pairs in {ATTEMPTS} handshakes")

    def _connected(self, endpoint: Endpoint, peer: Peer, device: str, deadline: float) -> bool:
        """Bring the endpoint to where we may post; False when another one has to be tried."""
        if endpoint.connected:
            if not _confirmed(endpoint, peer, min(READY_TIMEOUT, deadline - time.monotonic())):
                raise PeerLost(f"{endpoint.peer_path}: the peer does not confirm the connection that it asked for")
            return not endpoint.gone
        if endpoint.peer_path == endpoint.local_path:
            reply = endpoint.hello(None)
        else:
            answer = self._ask(endpoint, peer, deadline)
            if answer is None:
                return endpoint.connected
            reply = answer
        if not reply.gid:
            reply = replace(reply, gid=_published_gid(peer.descriptor, device))
        with endpoint.lock:
            if endpoint.gone or (endpoint.peer_numbers and not endpoint.belongs_to(reply)):
                return False
            if not endpoint.peer_numbers:
                endpoint.connect(reply)
        self._note_gid(endpoint)
        if reply.ready is not None:
            self._confirm(endpoint, peer, deadline)
        endpoint.ready.set()
        return not endpoint.gone

    def _ask(self, endpoint: Endpoint, peer: Peer, deadline: float) -> Hello | None:
        """The peer's answer; None where the exchange failed and the peer has connected us meanwhile."""
        where = f"the answer of {endpoint.peer_path}"
        try:
            answer = peer.handshake(endpoint.hello(False).to_json(), max(0.1, deadline - time.monotonic()))
            reply = _read(answer, where)
        except PeerLost:
            if endpoint.connected and endpoint.ready.wait(1.0):
                return None
            raise
        if reply.error:
            raise Refused(f"{endpoint.peer_path} refuses the connection from {endpoint.local_path}: {reply.error}")
        if (reply.local_path, reply.peer_path) != (endpoint.peer_path, endpoint.local_path):
            raise PeerLost(f"{where} is of {reply.local_path!r} for {reply.peer_path!r}")
        return reply

    def _confirm(self, endpoint: Endpoint, peer: Peer, deadline: float) -> None:
        request = endpoint.hello(None).ready_ack().to_json()
        answer = peer.handshake(request, max(0.1, deadline - time.monotonic()))
        reply = _read(answer, f"the confirmation of {endpoint.peer_path}")
        if reply.error:
            raise PeerLost(f"{endpoint.peer_path} does not confirm the connection: {reply.error}")

    # --- passive --------------------------------------------------------------------------------------------

    def answer(self, request: str) -> dict[str, Any]:
        """The reply to a peer's request; a refusal says why."""
        try:
            return self._answer(Hello.from_json(request, "the request")).to_json()
        except Exception as error:
            log.info("RDMA handshake refused: %s", error, exc_info=not isinstance(error, MooncakeError))
            return Hello("", "", (), error=str(error)[:LONGEST_ERROR]).to_json()

    def _answer(self, request: Hello) -> Hello:
        nic = next((nic for nic in self._nics if request.peer_path == f"{self.server}@{nic.name}"), None)
        if nic is None or "@" not in request.local_path:
            ours = ", ".join(f"{self.server}@{nic.name}" for nic in self._nics)
            raise PeerLost(
                f"Invalid argument: peer nic path inconsistency: {request.local_path!r} asks for"
                f" {request.peer_path!r}, here are {ours}"
            )
        if request.ready:
            return self._take_confirmation(nic, request)
        if not request.gid and self.lookup is not None:
            server, _, device = request.local_path.rpartition("@")
            request = replace(request, gid=_published_gid(self.lookup(server), device))
        with self._lock:
            known = self._known[nic.index].get(request.local_path)
        if known is not None and known.peer_numbers and not known.belongs_to(request):
            log.info("%s connects again: its old endpoint at %s is retired", request.local_path, nic)
            self.discard(known)
        endpoint = self._accept(nic, request)
        if not endpoint.belongs_to(request):
            raise PeerLost(f"{request.local_path} asks with several queue pairs at once")
        return endpoint.hello(None if request.ready is None else False)

    def _accept(self, nic: Nic, request: Hello) -> Endpoint:
        """The endpoint of the asking path, connected to its queue pairs if it was to none."""
        gids = nic.gids()
        for _ in range(ATTEMPTS + self._settings.gid_retries):
            endpoint = self._obtain(nic, gids[0], request.local_path)
            try:
                with endpoint.lock:
                    if not endpoint.peer_numbers:
                        endpoint.connect(request)
                        if request.ready is None:
                            endpoint.ready.set()
                self._note_gid(endpoint)
                return endpoint
            except BaseException as error:
                self.discard(endpoint)
                if not _other_gid(endpoint, error, gids):
                    raise
        raise PeerLost(f"{request.local_path}: no GID of {nic} connects to it")

    def _take_confirmation(self, nic: Nic, request: Hello) -> Hello:
        with self._lock:
            endpoint = self._known[nic.index].get(request.local_path)
        if endpoint is None or not endpoint.connected:
            raise PeerLost("Received RDMA ready ACK for unconnected endpoint")
        if not endpoint.belongs_to(request):
            raise PeerLost("Received RDMA ready ACK with mismatched peer QP numbers")
        endpoint.ready.set()
        return Hello("", "", ())

    # --- both -----------------------------------------------------------------------------------------------

    def _obtain(self, nic: Nic, gid: Gid, path: str) -> Endpoint:
        """The present endpoint of the path, or a new one with that GID of ours. Raises DeviceError."""
        known, evicted = self._known[nic.index], None
        with self._lock:
            endpoint = known.get(path)
            if endpoint is not None and not endpoint.gone:
                endpoint.used = True
                return endpoint
            if self._closed:
                raise PeerLost("the engine is closed")
            if len(known) >= self._settings.max_endpoints:
                evicted = known.evict()
            endpoint = Endpoint(nic, gid, f"{self.server}@{nic.name}", path, self._settings)
            known.put(path, endpoint)
        if evicted is not None:
            evicted.give_up()
        return endpoint

    def _note_gid(self, endpoint: Endpoint) -> None:
        """It is connected."""
        if endpoint.nic.connected_with(endpoint.gid):
            self._gid_changed()

    def discard(self, endpoint: Endpoint) -> None:
        """Forget it and end it."""
        known = self._known[endpoint.nic.index]
        with self._lock:
            if known.get(endpoint.peer_path) is endpoint:
                known.drop(endpoint.peer_path)
        endpoint.give_up()

    def reclaim(self) -> None:
        """Release the endpoints that broke while no lane used them, and those that no peer ever confirmed."""
        with self._lock:
            all_known = [endpoint for known in self._known for endpoint in known]
        broken = [endpoint for endpoint in all_known if endpoint.gone or endpoint.unconfirmed_for(UNCONFIRMED_LIFE_S)]
        for endpoint in broken:
            self.discard(endpoint)

    def close(self) -> None:
        """End all. Idempotent."""
        with self._lock:
            self._closed = True
            endpoints = [endpoint for known in self._known for endpoint in known]
        for endpoint in endpoints:
            endpoint.lost = None
            self.discard(endpoint)


def _read(answer: str, where: str) -> Hello:
    """What a peer answered. Raises PeerLost for anything else than a handshake."""
    try:
        return Hello.from_json(answer, where)
    except MalformedRecord as error:
        raise PeerLost(str(error)) from error


def _confirmed(endpoint: Endpoint, peer: Peer, timeout: float) -> bool:
    """Whether the peer confirms the connection that it asked for, within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not endpoint.ready.wait(CONFIRMATION_INTERVAL):
        if peer.interrupt.is_set or time.monotonic() > deadline:
            return False
    return True


def _used(endpoint: Endpoint) -> bool:
    used, endpoint.used = endpoint.used, False
    return used


def _other_gid(endpoint: Endpoint, error: BaseException, gids: list[Gid]) -> bool:
    """Whether connecting may have failed for our GID, here or at the peer, and one is left in `gids`, those to try:
    it is first then."""
    here = isinstance(error, DeviceError) and error.code == errno.EINVAL
    if not here and not isinstance(error, Refused):
        return False
    gids[:] = [gid for gid in gids if gid != endpoint.gid]
    return bool(gids)


def _published_gid(descriptor: SegmentDescriptor, device: str) -> bytes:
    """For originals before 0.3.11, whose handshakes have none."""
    text = next((d.gid for d in descriptor.devices if d.name == device), "")
    return bytes.fromhex(text.replace(":", ""))
