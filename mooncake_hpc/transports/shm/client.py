"""The initiator's side: maps a peer's memory files and copies."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.errors import MalformedRecord, MooncakeError, PeerLost, PeerSilent, RegistrationError
from mooncake_hpc.core.memory import Bytes, MemoryFile
from mooncake_hpc.core.process import own
from mooncake_hpc.native import ranges
from mooncake_hpc.native.atomics import word
from mooncake_hpc.transports import queue_kernels as layout
from mooncake_hpc.transports.base import Peer, Route, Tables
from mooncake_hpc.transports.queue import Lane, code_of
from mooncake_hpc.transports.shm import handoff
from mooncake_hpc.transports.shm import kernels as native
from mooncake_hpc.wire.descriptor import SegmentDescriptor


class Maps:
    """What a peer's registrations of one version look like from here."""

    def __init__(self, reply: handoff.Reply, files: dict[int, MemoryFile]) -> None:
        """`files` are those of the reply, by serial. Raises MalformedRecord where one is not as large as it says."""
        for serial, _, nbytes in reply.files:
            if files[serial].nbytes != nbytes:
                raise MalformedRecord(f"memory file {serial} has {files[serial].nbytes} bytes, not {nbytes}")
        self.version = reply.version
        self.files = files
        self.tables = Tables.of((address, address + nbytes, readonly) for address, nbytes, readonly in reply.buffers)
        self._rows = sorted(((address, files[serial]) for serial, address, _ in reply.files), key=lambda row: row[0])
        words = [value for start, file in self._rows for value in (start, file.nbytes, file.address)]
        self.index: npt.NDArray[np.int64] = np.array([len(self._rows), *words], np.uint64).view(np.int64)

    def view(self, address: int, nbytes: int) -> Bytes | None:
        """The peer's `nbytes` bytes at `address`, read-only, if they are registered and lie in one file."""
        place = bisect_right(self._rows, address, key=lambda row: row[0]) - 1
        if place < 0 or ranges.room(int(self.tables.pair[0]), word(address)) < nbytes:
            return None
        start, file = self._rows[place]
        offset = address - start
        if offset + nbytes > file.nbytes:
            return None
        array = file.array[offset : offset + nbytes]
        array.flags.writeable = False
        return array


class ShmLane(Lane):
    """One Unix socket, which tells that the peer lives, and the maps that came over it."""

    lead = native.lead

    def __init__(self, peer: Peer, connection: socket.socket, timeout: float) -> None:
        """The peer hands over its memory within `timeout` seconds. Raises OSError, ValueError."""
        super().__init__(f"shm/{peer.name}/0", peer.name, patience=1e9)
        self._expected = peer.expected
        self._socket = connection
        self._interrupt = peer.interrupt
        self._page: MemoryFile | None = None
        self._page_words: npt.NDArray[np.int64]
        self._sync_lock = threading.Lock()
        self._unanswered = 0  # requests
        try:
            self.maps = self._exchange({}, timeout)
        except BaseException:
            os.close(self._doorbell)
            raise
        assert self._page is not None
        self._set(native.FD, connection.fileno())
        self._set(native.PAGE, self._page.address)
        self._page_words = self._page.array.view(np.int64)
        self._install()
        layout.go_up(self.address)
        self._launch()

    def sync(self) -> None:
        """Ask for the peer's present registrations. Raises PeerLost."""
        with self._sync_lock:
            try:
                maps = self._exchange(self.maps.files, handoff.TIMEOUT)
            except TimeoutError as error:
                self.last_error = f"no answer within {handoff.TIMEOUT:g} s to what is registered there now"
                raise PeerSilent(f"{self.peer}: {self.last_error}") from error
            except ConnectionError as error:
                self.last_error = f"its process has ended, or has closed this connection: {error}"
                raise PeerLost(f"{self.peer}: {self.last_error}") from error
            except (OSError, ValueError) as error:  # MalformedRecord and RegistrationError are ValueErrors
                self.last_error = f"the peer does not hand over its memory: {error}"
                raise PeerLost(f"{self.peer}: {self.last_error}") from error
            with self.owned():
                self.maps = maps
                self._install()

    def view(self, address: int, nbytes: int) -> Bytes | None:
        """As `Maps.view`, of the peer's present registrations; None too when the peer is gone or the lane closed."""
        if self._get(layout.STATE) == layout.CLOSED:
            return None
        if self._page_words[native.PAGE_VERSION // 8] != self.maps.version:
            try:
                self.sync()
            except PeerLost:
                return None
        with contextlib.suppress(RegistrationError):  # closed this moment
            return self.maps.view(address, nbytes)
        return None

    def interrupt(self) -> None:
        """Nothing to cut: a copy ends by itself."""

    def repair(self) -> None:
        with self.owned():
            self._drop_cancelled()
        if self._get(layout.CAUSE) == native.STALE:
            try:
                self.sync()
                with self.owned():
                    layout.go_up(self.address)
                return
            except MooncakeError as error:
                code = code_of(error)
        else:
            self.last_error, code = "the peer's process has ended", layout.LOST
        with self.owned():
            self.fail_queue(code)

    def _drop_cancelled(self) -> None:
        self._set(native.OFFSET, 0)  # of the head slice, which begins again if it stays
        layout.drop_cancelled(self.address)

    def disconnect(self) -> None:
        self._socket.close()

    def let_go(self) -> None:
        """A dead peer's memory would stay in use for as long as anybody maps it."""
        assert self._page is not None
        self._page_words = self._page_words.copy()
        self._page.close()
        for file in self.maps.files.values():
            file.close()

    # --- inside ---------------------------------------------------------------------------------------------

    def _install(self) -> None:
        self._set(native.VERSION, self.maps.version)
        self._set(native.TABLES, self.maps.tables.address)
        self._set(native.FILES, int(self.maps.index.ctypes.data))

    def _exchange(self, known: dict[int, MemoryFile], timeout: float) -> Maps:
        """Ask, and take the answers to this and to all earlier requests. Raises OSError, ValueError;
        after a TimeoutError it may be tried again."""
        deadline = time.monotonic() + timeout
        maps: Maps | None = None
        with self._interrupt.cuts(self._socket):
            self._socket.settimeout(timeout)
            handoff.send(self._socket, {"have": list(known)}, [])
            self._unanswered += 1
            while self._unanswered:
                if not handoff.await_reply(self._socket, deadline - time.monotonic()):
                    raise TimeoutError
                maps = self._take_answer(maps.files if maps else known)
                self._unanswered -= 1
        assert maps is not None
        return maps

    def _take_answer(self, known: dict[int, MemoryFile]) -> Maps:
        """Raises as `_exchange`, but no TimeoutError."""
        try:
            return self._receive_maps(known)
        except TimeoutError as error:
            raise OSError("the peer stopped within an answer") from error

    def _receive_maps(self, known: dict[int, MemoryFile]) -> Maps:
        self._socket.settimeout(handoff.TIMEOUT)
        reply = handoff.receive(self._socket, handoff.read_reply)
        if reply is None:
            raise ConnectionResetError("the peer closed the connection")
        handoff.check_admitted(reply, self._expected)
        if reply.page != (self._page is None):
            raise MalformedRecord("the page comes once, with the first answer")
        if self._page is None:
            page = MemoryFile.attach(handoff.receive_fd(self._socket))
            if page.nbytes != native.PAGE_BYTES:
                raise MalformedRecord(f"the page has {page.nbytes} bytes, not {native.PAGE_BYTES}")
            self._page = page
        files = {serial: known[serial] for serial, _, _ in reply.files if serial in known}
        for serial in reply.new:
            files[serial] = MemoryFile.attach(handoff.receive_fd(self._socket))
        if missing := [serial for serial, _, _ in reply.files if serial not in files]:
            raise MalformedRecord(f"memory file {missing[0]} was not handed over")
        return Maps(reply, files)


class ShmRoute(Route):
    """Reaches those buffers of the peer that it allocated as memory files."""

    transport = "shm"

    def __init__(self, peer: Peer, connection: socket.socket, timeout: float) -> None:
        """As `ShmLane`."""
        self._lane = ShmLane(peer, connection, timeout)
        self._seen = peer.descriptor
        super().__init__([self._lane], self._lane.maps.tables)

    def update(self, descriptor: SegmentDescriptor) -> None:
        """The registrations come over the socket, which knows them before the metadata store does."""
        if descriptor is not self._seen:
            self._seen = descriptor
            with contextlib.suppress(PeerLost):  # then the requests fail with the lane
                self._lane.sync()
        self._set_tables(self._lane.maps.tables)

    def mapped(self, address: int, nbytes: int) -> Bytes | None:
        return self._lane.view(address, nbytes)


def dial(address: str, timeout: float = handoff.TIMEOUT) -> socket.socket | None:
    """A connection to the peer's hand-over socket, within `timeout` seconds; None when it is not on this host, or not
    our user's."""
    connection = own(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
    try:
        connection.settimeout(timeout)
        _connect(connection, "\0" + address, time.monotonic() + timeout)
        if handoff.peer_is_ours(connection):
            return connection
    except OSError:
        pass
    connection.close()
    return None


def _connect(connection: socket.socket, address: str, deadline: float) -> None:
    """connect(), which does not wait for a Unix socket with a full backlog. Raises OSError."""
    while True:
        try:
            connection.connect(address)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
