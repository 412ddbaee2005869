"""The lane to one peer: its rails, opened on first use, replaced where they break."""

from __future__ import annotations

import contextlib
import logging
import select
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.errors import DeviceError, MooncakeError, PeerLost
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports import queue_kernels as layout
from mooncake_hpc.transports import recut_kernels as recut
from mooncake_hpc.transports.base import Peer, Route
from mooncake_hpc.transports.queue import Lane, code_of, spin_time
from mooncake_hpc.transports.rdma import poll_kernels as native
from mooncake_hpc.transports.rdma import post_kernels as rdma_post
from mooncake_hpc.transports.rdma import rail_kernels as rails
from mooncake_hpc.transports.rdma import verbs_kernels as verbs_layout
from mooncake_hpc.transports.rdma.nic import Nic
from mooncake_hpc.transports.rdma.paths import Path, Plan, plan
from mooncake_hpc.transports.rdma.pool import Pool
from mooncake_hpc.transports.rdma.rail import Rail
from mooncake_hpc.transports.rdma.regions import KeyTables, Regions, remote_rows
from mooncake_hpc.transports.rdma.topology import Topology
from mooncake_hpc.wire.descriptor import SegmentDescriptor

log = logging.getLogger(__name__)

MAX_RAILS = 8
ATTEMPTS = 3  # breaks in a row without one more completed slice before the queue fails; one a path where those are more
HANDSHAKE_TIMEOUT = 10.0  # seconds
FLUSH_TIMEOUT = 2.0  # seconds for a device to give back what was under way, after which the queue pairs are destroyed
WINDOW = 1 << 20  # bytes under way a rail where there are several
SPIN_FACTOR = 4  # of what other lanes poll: the peer needs no core of ours to answer


class LaneBlock:
    """The words of `transports.rdma.poll_kernels` in a lane's block, and the arrays that they refer to."""

    def __init__(self, words: np.ndarray, slots: int) -> None:
        """`slots` is how many slices may ever be under way."""
        capacity = 1 << (slots - 1).bit_length()
        self.rails = np.zeros(MAX_RAILS, np.int64)
        self._retry = np.zeros(2 * capacity, np.int64)
        self._completions = np.zeros(rails.POLLED * verbs_layout.WC // 8, np.int64)
        self._events = np.zeros(2 * rails.MAX_EVENTS, np.int64)
        for word, value in (
            (rails.RAILS, int(self.rails.ctypes.data)),
            (rails.RETRY, int(self._retry.ctypes.data)),
            (rails.RETRY_MASK, capacity - 1),
            (rails.COMPLETIONS, int(self._completions.ctypes.data)),
            (rails.EVENTS, int(self._events.ctypes.data)),
            (rails.WINDOW, WINDOW),
        ):
            words[word // 8] = value


class RdmaLane(Lane):
    """Everything to one peer. A broken rail is flushed before its slices go over another."""

    lead = native.lead

    def __init__(
        self, peer: Peer, nics: Sequence[Nic], topology: Topology, pool: Pool, regions: Regions, keys: KeyTables,
        settings: Settings,
    ) -> None:  # fmt: skip
        super().__init__(f"rdma/{peer.name}/0", peer.name, settings.transfer_timeout)
        self._set(layout.SPIN, SPIN_FACTOR * spin_time())
        self._peer, self._nics, self._topology, self._pool, self._settings = peer, nics, topology, pool, settings
        self._rails: list[Rail] = []
        self._paused: dict[Path, float] = {}  # until when (time.monotonic())
        self._opened = False
        self._recut: list[
            tuple[int, npt.NDArray[np.int64]]
        ] = []  # slices cut anew, and up to which entry they are used
        self._failures, self._stuck_at = 0, (-1, -1)
        self._block = LaneBlock(self.words, MAX_RAILS * settings.rdma.queue_pairs * settings.rdma.max_wr)
        self._set(rails.LOCAL_KEYS, regions.tables.address)
        self._set(rails.REMOTE_KEYS, keys.address)
        self._set(rails.FAILURES, settings.rdma.retries)
        self._epoll = select.epoll()
        self._epoll.register(self._doorbell, select.EPOLLIN)
        self._set(rails.EPOLL, self._epoll.fileno())
        self._launch()

    # --- what others call -----------------------------------------------------------------------------------

    def interrupt(self) -> None:
        for rail in list(self._rails):
            rail.flush(self.address)
        self.wake()

    def wake(self) -> None:
        """Have the lane's thread look after the rails."""
        self._set(layout.WANTED, 1)
        layout.ring_thread(self.address)
        layout.ring_leader(self.address)

    def device_changed(self, nic: Nic) -> None:
        """Its port came or went."""
        if nic.active:
            for path in [path for path in self._paused if path.local == nic.index]:
                self._paused.pop(path, None)
        else:
            for rail in list(self._rails):
                if rail.path.local == nic.index:
                    rails.spoil(self.address, rail.address, verbs_layout.FLUSHED, 0)
                    self.last_error = f"RDMA device {nic} is down"
        self.wake()

    def look_after(self) -> None:
        """Called once in a while: paths whose pause is over are opened again; rails that carry count as used."""
        for rail in list(self._rails):
            rail.note_use()
        now = time.monotonic()
        if self._rails and any(until <= now for until in list(self._paused.values())):
            self.wake()

    @property
    def max_message(self) -> int:
        """Bytes that one work request may carry."""
        return min((nic.port.max_message for nic in self._nics), default=1 << 30)

    @property
    def turn(self) -> int:
        return self._get(rails.TURN)

    def past(self, turn: int) -> bool:
        """Whether no kernel looks at anything that was replaced in that turn."""
        return self._get(rails.TURN) != turn or self._get(layout.OWNER) == 0

    # --- the lane's thread ----------------------------------------------------------------------------------

    def tend(self) -> None:
        if not self._get(layout.WANTED):
            return
        self._set(layout.WANTED, 0)
        self._drain_events()
        if self._get(rails.STALE):
            self._refresh()
        self._bury()
        if self._get(layout.STATE) == layout.UP and any(rail.state == rails.LIVE for rail in self._rails):
            self._open_missing()

    def repair(self) -> None:
        self._bury()
        while self._is_needed():
            try:
                self._check_hope()
                self._open_first()
            except Exception as error:
                if self._peer.interrupt.is_set:
                    return
                if not isinstance(error, (OSError, MooncakeError)):
                    log.exception("%s: opening RDMA connections", self.peer)
                self._failures += 1
                self._note(str(error))
                with self.owned():
                    self.fail_queue(code_of(error))
                return
            with self.owned():
                self._set(layout.PROGRESS, time.monotonic_ns())
                layout.go_up(self.address)
            self.wake()
            return

    def _is_needed(self) -> bool:
        """Whether anything is queued for a connection."""
        with self.owned():
            self._drop_cancelled()
            return self.pending and self._get(layout.STATE) == layout.DOWN

    def _drop_cancelled(self) -> None:
        native.drop_cancelled(self.address)

    def fail_queue(self, code: int) -> None:
        for rail in list(self._rails):
            rail.flush(self.address)
        self._bury(owned=True)
        native.fail_queue(self.address, code)
        self._failures, self._stuck_at = 0, (-1, -1)

    def disconnect(self) -> None:
        self._epoll.close()

    # --- inside ---------------------------------------------------------------------------------------------

    def _bury(self, owned: bool = False) -> None:
        """Flush broken rails, see all that was under way come back, and take them out."""
        own: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext if owned else self.owned
        for rail in [rail for rail in self._rails if rail.state != rails.LIVE]:
            rail.flush(self.address)
            while True:
                with own():
                    rdma_post.post_ends(self.address, rail.address)
                    native.settle(self.address)
                    if rail.state != rails.DEAD and time.monotonic() - rail.flushed_at > FLUSH_TIMEOUT:
                        log.warning("%s: what was under way does not come back", rail.explain())
                        rail.endpoint.close_pairs()
                        native.take_back(self.address, rail.address)
                    if rail.state == rails.DEAD:
                        self._take_out(rail)
                        break
                time.sleep(0.0005)

    def _take_out(self, rail: Rail) -> None:
        """As the owner."""
        self._rails.remove(rail)
        self._list_rails()
        if rail.faulty:
            at = self._get(layout.HEAD), self._get(layout.BYTES)
            self._failures = self._failures + 1 if at == self._stuck_at else 1
            self._stuck_at = at
            self._note(rail.explain())
            log.info("%s; paused for %g s", rail.explain(), self._settings.rdma.rail_pause)
            self._paused[rail.path] = time.monotonic() + self._settings.rdma.rail_pause
        rail.endpoint.lost = None
        self._pool.discard(rail.endpoint)

    def _note(self, error: str) -> None:
        """The first cause since something was carried stays in what batches fail with, before what came of it."""
        if self._failures <= 1 or not self.last_error:
            self.last_error = error
        elif error not in self.last_error:
            self.last_error += f"; {error}"

    def _check_hope(self) -> None:
        """Raise PeerLost when everything was tried without one more completed slice."""
        if self._failures >= max(ATTEMPTS, len(self._plan().paths)):
            raise PeerLost(f"{self._failures} connections in a row carried nothing")

    def _refresh(self) -> None:
        """A key was refused: the peer may have registered other memory at its address."""
        try:
            self._peer.refresh()
        except MooncakeError as error:
            self._note(str(error))
        with self.owned():
            self._cut_anew()
        self._set(rails.STALE, 0)

    def _cut_anew(self) -> None:
        """As the owner: cut what is not under way by the peer's present buffers, which may be others than before."""
        tables, head = self._get(rails.REMOTE_KEYS), self._get(layout.HEAD)
        self._recut = [kept for kept in self._recut if kept[0] > head]
        if count := rails.count_splits(self.address, tables):
            self._recut.append((self.queued, slices := np.empty(4 * count, np.int64)))
            rails.split(self.address, tables, int(slices.ctypes.data))
        first = self._get(rails.SEND_SEQ) + (self._get(rails.SEND_SLICE) > 0)
        for seq in range(first, self.queued):
            if count := recut.count_pieces(self.address, seq, tables):
                self._recut.append((seq + 1, slices := np.empty(4 * count, np.int64)))
                recut.cut_anew(self.address, seq, tables, int(slices.ctypes.data), count)

    def _plan(self) -> Plan:
        descriptor = self._peer.descriptor
        remote = {
            location: (tuple(lists[0]), tuple(lists[-1]))
            for location, lists in descriptor.priority_matrix.items()
            if lists
        }
        return plan(
            [nic.name for nic in self._nics], self._topology.matrix, [d.name for d in descriptor.devices], remote
        )

    def _wanted(self) -> list[Path]:
        """The paths that should carry bytes now, best first."""
        now, made = time.monotonic(), self._plan()
        alive = [path for path in made.paths if self._nics[path.local].active]
        rested = [path for path in alive if self._paused.get(path, 0.0) <= now]
        return rested[: min(made.width, MAX_RAILS)]

    def _open_first(self) -> None:
        """Rails over all wanted paths of a lane that has none, so that they share from the first request on.
        Raises MooncakeError, of the first path that failed, where none could be opened."""
        if self._opened:
            self._peer.refresh()
            with self.owned():
                self._cut_anew()
            self._set(rails.STALE, 0)
        self._opened = True
        paths = self._wanted()
        width = len(paths)
        if not paths:  # all are paused or down: rather try those than nothing
            paths = [path for path in self._plan().paths if self._nics[path.local].active]
        if not paths:
            names = ", ".join(str(nic) for nic in self._nics)
            raise DeviceError(f"{self.peer}: no RDMA device is active: {names}")
        first: MooncakeError | None = None
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT  # for all together: a peer that is silent is so on all paths
        for path in paths:
            left = deadline - time.monotonic()
            if len(self._rails) >= max(1, width) or left <= 0 or self._get(layout.STATE) == layout.CLOSED:
                break
            try:
                rail = self._open(path, left)
                with self.owned():
                    self._attach(rail)
            except MooncakeError as error:
                first = first or error
                self._paused[path] = time.monotonic() + self._settings.rdma.rail_pause
        if not self._rails:
            raise first or PeerLost(f"{self.peer}: the lane is closed")

    def _open_missing(self) -> None:
        """Further rails, while others carry bytes."""
        for path in self._wanted():
            if self._get(layout.STATE) != layout.UP or any(rail.path == path for rail in self._rails):
                continue
            if len(self._rails) >= MAX_RAILS:
                return
            try:
                rail = self._open(path, HANDSHAKE_TIMEOUT)
                with self.owned():
                    self._attach(rail)
            except MooncakeError as error:
                log.info("%s; paused for %g s", error, self._settings.rdma.rail_pause)
                self._paused[path] = time.monotonic() + self._settings.rdma.rail_pause

    def _open(self, path: Path, timeout: float) -> Rail:
        device = self._peer.descriptor.devices[path.remote].name
        deadline = time.monotonic() + timeout
        while True:
            endpoint = self._pool.open(self._nics[path.local], self._peer, device, deadline - time.monotonic())
            rail = Rail(path, endpoint)
            try:
                endpoint.attach(lambda rail=rail: self._lose(rail))  # type: ignore[misc]
            except PeerLost:  # the peer has connected anew just now
                if time.monotonic() > deadline:
                    raise
                continue
            self._paused.pop(path, None)
            return rail

    def _attach(self, rail: Rail) -> None:
        """As the owner."""
        if rail.endpoint.queue.fd >= 0:  # edges: nobody takes the events out of the channel before they are many
            self._epoll.register(rail.endpoint.queue.fd, select.EPOLLIN | select.EPOLLET)
        self._rails.append(rail)
        self._list_rails()

    def _list_rails(self) -> None:
        for number, rail in enumerate(self._rails):
            self._block.rails[number] = rail.address
        self._set(rails.RAIL_COUNT, len(self._rails))

    def _lose(self, rail: Rail) -> None:
        """The peer has replaced the endpoint, or the pool has evicted it."""
        rail.flush(self.address)
        self.wake()

    def _drain_events(self) -> None:
        for rail in list(self._rails):
            if not rail.endpoint.gone:
                rail.endpoint.queue.drain_events()


class RdmaRoute(Route):
    """One lane; its slices are MC_SLICE_SIZE long and lie in one region on both sides."""

    transport = "rdma"

    def __init__(self, lane: RdmaLane, keys: KeyTables, regions: Regions, settings: Settings) -> None:
        self._keys = keys
        self.lane = lane
        limit = min(settings.rdma.slice_size, lane.max_message // 2)  # with its tail a slice is at most twice as long
        super().__init__([lane], keys, limit)
        self._block[layout.ROUTE_TAIL // 8] = limit // settings.rdma.fragment_ratio
        self._block[layout.ROUTE_BORDERS // 8] = regions.tables.address

    def update(self, descriptor: SegmentDescriptor) -> None:
        old = self._keys.fill(remote_rows(descriptor))
        self._set_tables(self._keys)
        del old  # not before our block refers to the new ones
