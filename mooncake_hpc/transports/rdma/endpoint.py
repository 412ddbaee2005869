"""An endpoint: some queue pairs between a device of ours and one NIC path of a peer, for both sides' transfers."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from mooncake_hpc.core.errors import DeviceError, PeerLost
from mooncake_hpc.core.settings import RdmaSettings
from mooncake_hpc.transports.rdma.gid import Gid
from mooncake_hpc.transports.rdma.nic import Nic
from mooncake_hpc.transports.rdma.verbs import Calls, Link
from mooncake_hpc.wire.rdma_handshake import Hello

log = logging.getLogger(__name__)

READY_TIMEOUT = 10.0  # seconds for the active side to confirm, as the original


class Endpoint:
    """Connected once, by whichever side was first; a connection that broke is replaced by a new endpoint.

    `lost` is called (from any thread) when the peer or the pool gives it up while a lane uses it; the lane then
    closes it.
    """

    def __init__(self, nic: Nic, gid: Gid, local_path: str, peer_path: str, settings: RdmaSettings) -> None:
        """Raises DeviceError."""
        self.nic, self.gid, self.local_path, self.peer_path = nic, gid, local_path, peer_path
        self._settings = settings
        entries = min(nic.device.max_completions, settings.max_cqe)
        share = entries // settings.queue_pairs  # each work request may complete with an error
        self.depth = 1 << (min(settings.max_wr, nic.device.max_depth, max(1, share)).bit_length() - 1)
        self.queue = nic.device.queue(settings.queue_pairs * self.depth)
        self._pairs = []
        try:
            for _ in range(settings.queue_pairs):
                self._pairs.append(nic.device.queue_pair(self.queue, self.depth))
        except BaseException:
            self.close()
            raise
        self.lock = threading.Lock()
        self.peer_numbers: tuple[int, ...] = ()  # empty: not connected
        self.connected_at = math.inf  # of time.monotonic()
        self.ready = threading.Event()
        self.gone = False
        self.lost: Callable[[], None] | None = None
        self.used = True  # since the pool looked last

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(pair.number for pair in self._pairs)

    @property
    def connected(self) -> bool:
        return bool(self.peer_numbers) and not self.gone

    def hello(self, ready: bool | None) -> Hello:
        """What we say to the peer."""
        mtu = min(self.nic.port.mtu, self._settings.mtu)
        return Hello(self.local_path, self.peer_path, self.numbers, self.nic.port.lid, self.gid.value, ready, mtu)

    def connect(self, peer: Hello) -> None:
        """To RTS, with as many queue pairs as both have. The caller holds `lock`. Raises DeviceError, PeerLost."""
        count = min(len(self._pairs), len(peer.numbers))
        if count == 0:
            raise PeerLost(f"{self.peer_path}: it offers no queue pair")
        if len(peer.gid) == 0:
            raise PeerLost(f"{self.peer_path}: it tells no GID")
        mtu = min(self.nic.port.mtu, self._settings.mtu)
        settings = self._settings
        for pair, number in zip(self._pairs, peer.numbers, strict=False):
            pair.connect(
                Link(
                    number, peer.gid, peer.lid, self.gid.index, min(mtu, peer.mtu or mtu),
                    settings.traffic_class, settings.service_level, settings.pkey_index,
                )
            )  # fmt: skip
        for pair in self._pairs[count:]:
            pair.close()
        del self._pairs[count:]
        self.peer_numbers = peer.numbers[:count]
        self.connected_at = time.monotonic()

    def unconfirmed_for(self, seconds: float) -> bool:
        """Whether the other side has asked for it so long ago, and never confirmed that it has it."""
        return not self.ready.is_set() and time.monotonic() - self.connected_at > seconds

    def belongs_to(self, peer: Hello) -> bool:
        """Whether it is connected to just these queue pairs."""
        return self.connected and self.peer_numbers == peer.numbers[: len(self.peer_numbers)]

    def calls(self) -> list[Calls]:
        """For a kernel, one a queue pair."""
        return [pair.calls() for pair in self._pairs]

    def to_error(self) -> None:
        """Have everything under way flushed; nothing is sent over it any more."""
        self.gone = True
        for pair in list(self._pairs):
            pair.to_error()

    def give_up(self) -> None:
        """End it: at once, or where a lane uses it when that has seen what was under way."""
        self.to_error()
        with self.lock:
            lost = self.lost
            if lost is None:
                self.close()
        if lost is not None:
            lost()

    def attach(self, lost: Callable[[], None]) -> None:
        """A lane uses it from now on. Raises PeerLost when it was given up meanwhile."""
        with self.lock:
            if self.gone:
                raise PeerLost(f"{self.peer_path}: the connection was given up")
            self.lost = lost

    def close_pairs(self) -> None:
        """Destroy the queue pairs: nothing of ours is touched through them any more. Idempotent."""
        self.gone = True
        while self._pairs:
            try:
                self._pairs.pop().close()
            except DeviceError as error:
                log.warning("%s", error)

    def close(self) -> None:
        """Release everything. Idempotent; never raises."""
        self.close_pairs()
        try:
            self.queue.close()
        except DeviceError as error:
            log.warning("%s", error)
