"""TransferEngine: one segment of registered memory, and batches to and from other segments."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mooncake_hpc.control.directory import Directory
from mooncake_hpc.control.server import (
    ControlServer,
    Handlers,
    Notifications,
    open_rpc_listener,
    refuse_connection,
)
from mooncake_hpc.core import process
from mooncake_hpc.core.address import P2PHANDSHAKE, bind_listener, published_address
from mooncake_hpc.core.authentication import Authentication, Reason
from mooncake_hpc.core.errors import AddressRejected, AuthenticationError, MooncakeError, PeerLost, RegistrationError
from mooncake_hpc.core.limits import limited
from mooncake_hpc.core.memory import MemoryFile, describe
from mooncake_hpc.core.names import check_text
from mooncake_hpc.core.request import READ, REQUEST, WRITE, Requests
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.engine import slice_kernels as slicer
from mooncake_hpc.engine.batch import Batch
from mooncake_hpc.engine.registrations import Registrations, describe_all, published, release, take_out
from mooncake_hpc.engine.remote_segment import Segment
from mooncake_hpc.engine.submitter import Submitter
from mooncake_hpc.metadata.base import MetadataStore
from mooncake_hpc.native import ranges
from mooncake_hpc.native.compile import compile_ahead
from mooncake_hpc.transports.base import Registration, Tables
from mooncake_hpc.transports.queue import Lane
from mooncake_hpc.transports.registry import DeviceChoice, make_transports
from mooncake_hpc.wire.descriptor import SegmentDescriptor

log = logging.getLogger(__name__)

CLOSED = "this engine was closed"  # the cause of what is lost then


class TransferEngine:
    """A context manager; thread-safe. It belongs to the process that made it: in a forked child, all calls of it, its
    segments and its batches raise ForkError, except `close`, which does nothing there.

    `name` is the segment's name, `host:port` by custom, whether or not it resolves. `metadata` is `host:port` or
    `etcd://a:1,b:2` of etcd, `P2PHANDSHAKE`, `memory://x` (one process) or a MetadataStore, which stays the
    caller's. `protocol` is `rdma`, `tcp`, `shm`, or `auto`: shared memory where it can be had, else rdma where its
    devices are named or `auto_discovery` finds some, else tcp. `device_name` (`a,b`) and the file
    `nic_priority_matrix` choose the RDMA devices; without either all that are usable are found. The published
    address is `bind_address`, else by the rules of `address.published_address`; listeners bind only that unless
    `bind_all`. Peers prove that they know the content of the settings' `secret_file`, if there is one.

    Raises ConfigError, DeviceError, LimitError, MetadataUnavailable, NameInUse.
    """

    def __init__(
        self,
        name: str,
        metadata: str | MetadataStore,
        *,
        protocol: str = "auto",
        bind_address: str = "",
        bind_all: bool = False,
        settings: Settings | None = None,
        device_name: str = "",
        nic_priority_matrix: str = "",
        auto_discovery: bool = False,
    ) -> None:
        self._settings = settings or Settings.from_env()
        self._process = process.here
        self._closers: list[Callable[[], None]] = []
        self._lock = threading.RLock()
        self._registrations: Registrations = ()
        self._segments: dict[int, Segment] = {}
        self._replaced: dict[int, str] = {}  # names of segments that were replaced, by their former id
        self._by_name: dict[str, Segment] = {}
        self._notifications = Notifications()
        self._submitter = Submitter(self._segments, self._replaced, self._settings.transfer_timeout)
        self._adopt(())
        self._closed = False
        try:
            devices = DeviceChoice(device_name, nic_priority_matrix, auto_discovery)
            with limited(f"engine {name!r} cannot start"):
                self._start(name, metadata, protocol, bind_address, bind_all, devices)
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        name: str,
        metadata: str | MetadataStore,
        protocol: str,
        host: str,
        bind_all: bool,
        devices: DeviceChoice,
    ) -> None:
        settings = self._settings
        self._authentication = Authentication.load(settings)
        spec = metadata if isinstance(metadata, str) else metadata.spec
        store = self._open_store(metadata)
        host = host or published_address(name, spec, settings)
        listener = bind_listener(host, [0], bind_all)
        compile_ahead(slicer.submit, slicer.reset, slicer.cut, slicer.assign)
        self._transports = make_transports(protocol, listener, host, settings, devices, self._authentication)
        self._closers += [transport.close for transport in self._transports]
        rpc = open_rpc_listener(name, host, settings, peer_to_peer=store is None, bind_all=bind_all)
        generation = secrets.token_hex(8)
        self._directory = Directory(
            name,
            store,
            settings,
            generation=generation,
            rpc_host=host,
            rpc_port=rpc.getsockname()[1],
            authentication=self._authentication,
        )
        self.name = self._directory.name
        self._authentication.name, self._authentication.generation = self.name, generation
        self._own = SegmentDescriptor(self.name, generation=generation)
        for transport in self._transports:
            transport.start(self.name, self._republish, self._directory.lookup)
        handlers = Handlers(
            generation, self._directory.metadata_reply, self._notifications.put, self._fence, self._answer
        )
        control = ControlServer(rpc, handlers, settings, self._authentication)
        self._closers.append(control.stop)
        self._closers.append(self._directory.withdraw)
        self._publish(())

    def _open_store(self, metadata: str | MetadataStore) -> MetadataStore | None:
        if isinstance(metadata, MetadataStore):
            return metadata
        if metadata == P2PHANDSHAKE:
            return None
        from mooncake_hpc.metadata.store import open_store

        store = open_store(metadata, self._settings)
        self._closers.append(store.close)
        return store

    @property
    def generation(self) -> str:
        """Random a process: tells this engine from predecessors of the same name."""
        process.check(self)
        return self._own.generation

    # --- memory ---------------------------------------------------------------------------------------------

    def allocate(
        self,
        nbytes: int,
        location: str = "cpu:0",
        remote_accessible: bool = True,
        *,
        writable_by_peers: bool = True,
    ) -> npt.NDArray[np.uint8]:
        """`nbytes` of zeroed shared memory, registered, as a uint8 array; peers on this host may map it.

        It lives until it is unregistered (or the engine closed) and the last view of it is gone. Rights are those of
        `register`. Raises RegistrationError, LimitError, and as `register`.
        """
        process.check(self)
        with limited(f"{nbytes} bytes cannot be allocated"):
            file = MemoryFile(nbytes)
        array = file.array
        rights = remote_accessible, array, file, True, writable_by_peers
        self._add([Registration(file.address, nbytes, location, False, *rights)])
        return array

    def register(
        self,
        obj: object,
        location: str = "cpu:0",
        remote_accessible: bool = True,
        *,
        writable_by_peers: bool = True,
    ) -> None:
        """Let transports touch the memory of `obj`: anything with the buffer protocol, `__array_interface__`, or
        `__dlpack__` on the CPU. It is kept alive until unregistered; read-only memory is registered read-only.
        Shared memory carries to and from it only where it lies in what `allocate` gave: else it is for tcp.

        Peers may neither read nor write what is not `remote_accessible`, and only read what is not
        `writable_by_peers`: their WRITEs are refused. (Over shared memory a process of our own user that does not keep
        to our protocol can write all the same, as it could by ptrace(2).)

        Raises RegistrationError, MetadataError (more buffers than one value holds), MetadataUnavailable.
        """
        process.check(self)
        self.register_many([obj], location, remote_accessible, writable_by_peers=writable_by_peers)

    def register_many(
        self,
        objects: Iterable[object],
        location: str = "cpu:0",
        remote_accessible: bool = True,
        *,
        writable_by_peers: bool = True,
    ) -> None:
        """As `register` for several, with a single metadata write; on an error none is registered."""
        process.check(self)
        self._add(describe_all(objects, location, remote_accessible, writable_by_peers))

    def unregister(self, obj: object) -> None:
        """Undo `register` or `allocate`; on return no peer touches the memory any more. Raises RegistrationError."""
        process.check(self)
        self.unregister_many([obj])

    def unregister_many(self, objects: Iterable[object]) -> None:
        """As `unregister` for several, with a single metadata write."""
        process.check(self)
        with self._lock:
            gone, left = take_out(self._registrations, objects)
            self._publish(left)
            for transport in self._transports:
                transport.export(left, shrinks=True)
            self._adopt(left)
            for lane in self._lanes():  # the last batches hold what was registered when they began
                lane.drop_done()
        release(gone, left)

    def _add(self, registrations: list[Registration]) -> None:
        with self._lock:
            if self._closed:
                raise RegistrationError(f"engine {self.name!r} is closed")
            for location in {registration.location for registration in registrations}:
                check_text(location, "a location")  # a peer would refuse all that we publish
            before, after = self._registrations, (*self._registrations, *registrations)
            self._adopt(after)
            try:
                for transport in self._transports:
                    transport.export(after, shrinks=False)
                if any(r.remote_accessible for r in registrations):
                    self._publish(after)
            except BaseException:
                self._adopt(before)
                for transport in self._transports:
                    transport.export(before, shrinks=True)
                raise

    def _adopt(self, registrations: Registrations) -> None:
        local = Tables.of((r.address, r.address + r.length, r.readonly) for r in registrations)
        self._submitter.set_memory(local, registrations)
        self._registrations = registrations

    def _publish(self, registrations: Registrations) -> None:
        buffers = published(registrations)
        for transport in self._transports:
            buffers = transport.buffers(buffers)
            self._own = transport.describe(self._own)
        self._own = self._own.with_buffers(buffers)
        self._directory.publish(self._own)

    def _republish(self) -> None:
        """A transport has something new to say of itself."""
        with self._lock:
            if not self._closed:
                self._publish(self._registrations)

    # --- transfers ------------------------------------------------------------------------------------------

    def open_segment(self, name: str) -> Segment:
        """The segment of this name, ready for requests; opened again after its process was replaced.

        It takes four look-ups of MOONCAKE_HPC_METADATA_TIMEOUT seconds at most; where shared memory is mapped, also
        three steps of MC_HANDSHAKE_CONNECT_TIMEOUT.

        Raises SegmentNotFound, MetadataUnavailable, MalformedRecord, PeerLost, LimitError; ConfigError for what can be
        no name.
        """
        process.check(self)
        with self._lock:
            if self._closed:
                raise PeerLost(f"engine {self.name!r} is closed")
            known = self._by_name.get(name)
            if known is not None:
                if not known.replaced():
                    return known
                self._let_go(known)
            number = len(self._segments) + len(self._replaced)
            segment = Segment(number, name, self._directory, self._settings, self._authentication)
            try:
                with limited(f"segment {name!r} cannot be reached"):
                    segment.connect(self._transports)
            except BaseException:
                segment.close("it could not be opened")
                raise
            self._segments[segment.id] = segment
            self._by_name[name] = segment
            self._submitter.set_segments()
            return segment

    def _let_go(self, segment: Segment) -> None:
        """Close a segment whose process was replaced. Its id is never used again, and costs next to nothing."""
        segment.close(f"the process of segment {segment.name!r} was replaced: open the segment again")
        del self._segments[segment.id], self._by_name[segment.name]
        self._replaced[segment.id] = segment.name
        self._submitter.set_segments()

    def submit(
        self, requests: Requests, timeout: float | None = None, done_at: npt.NDArray[np.int64] | None = None
    ) -> Batch:
        """Start the transfers of a REQUEST array, in any order and at once; thread-safe.

        The array may be reused on return; the memory may not be touched until the batch is done. Waits only while a
        peer's queue is full, at most `timeout` seconds (None: MC_TRANSFER_TIMEOUT), then raises TransferTimeout.
        `done_at`, an int64 a request, is given the `time.monotonic_ns()` at which each is done, and keeps what it holds
        for those that fail. Raises AddressRejected for a range that is not registered here or there, with nothing
        started, and PeerLost.
        """
        if self._process is not process.here:
            process.refuse(self)
        return self._submitter.submit(requests, timeout, done_at)

    def transfer(
        self, requests: Requests, timeout: float | None = None, done_at: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Submit and return when all are done: quicker than `submit` and `Batch.wait`, and the memory is the caller's
        again however it ends, since a batch that fails, or runs into `timeout` seconds (None: MC_TRANSFER_TIMEOUT) or
        a Ctrl-C, is cancelled first. Raises as `submit` and `Batch.wait`.
        """
        if self._process is not process.here:
            process.refuse(self)
        self._submitter.transfer(requests, timeout, done_at)

    def repeat(
        self,
        requests: Requests,
        latencies: npt.NDArray[np.int64],
        seconds: float,
        timeout: float | None = None,
        request_latencies: npt.NDArray[np.int64] | None = None,
    ) -> int:
        """As `transfer`, again and again, at least once and at most as often as `latencies` has room for the
        nanoseconds that each took; none begins after `seconds`. How many there were. Python has no part in it between
        them: each is some 2 us quicker than in a loop around `transfer`.

        `request_latencies`, an int64 array of shape (rows, requests), is given the nanoseconds from a batch's
        submission to the end of each of its requests, a row for one batch of every `len(latencies) / rows`, and keeps
        what it holds where there was none. Raises as `transfer`, once one has failed: in `latencies` its place and
        those after it stay as they were, and a row of its own is 0.
        """
        if self._process is not process.here:
            process.refuse(self)
        return self._submitter.repeat(requests, latencies, seconds, timeout, request_latencies)

    def read(self, local: object, segment: Segment, remote_addr: int, timeout: float | None = None) -> None:
        """Fill `local` from `remote_addr` in the segment and return when done. Raises as `transfer`."""
        process.check(self)
        self._transfer_one(READ, local, segment, remote_addr, timeout)

    def write(self, local: object, segment: Segment, remote_addr: int, timeout: float | None = None) -> None:
        """Copy `local` to `remote_addr` in the segment and return when done. Raises as `transfer`."""
        process.check(self)
        self._transfer_one(WRITE, local, segment, remote_addr, timeout)

    def _transfer_one(self, opcode: int, local: object, segment: Segment, remote: int, timeout: float | None) -> None:
        view = describe(local)
        if not 0 <= remote < ranges.SPACE:
            raise AddressRejected(f"address {remote:#x} in segment {segment.name!r} is none of 64 bits")
        self.transfer(np.array([(opcode, segment.id, view.address, remote, view.nbytes)], REQUEST), timeout)

    def lane_bytes(self) -> dict[str, int]:
        """Payload bytes that our batches moved, by lane (`tcp/<segment>/0`)."""
        process.check(self)
        with self._lock:
            return {lane.name: lane.bytes for lane in self._lanes()}

    def _lanes(self) -> Iterator[Lane]:
        return (lane for segment in self._segments.values() for route in segment.routes for lane in route.lanes)

    # --- messages -------------------------------------------------------------------------------------------

    def notify(self, segment: Segment, name: str, text: str) -> None:
        """Hand (name, text) to the segment's process. Raises PeerLost; TransferError when it refuses."""
        process.check(self)
        segment.notify(name, text)

    def notifications(self) -> list[tuple[str, str]]:
        """What peers sent by `notify` since the last call: (name, text), oldest first."""
        process.check(self)
        return self._notifications.take()

    def probe(self, name: str, timeout: float = 1.0) -> bool:
        """Whether the process behind the segment `name` answers within `timeout` seconds; `check` tells why not.

        Raises SegmentNotFound, MetadataUnavailable, and AuthenticationError where one answers that we have no common
        secret with.
        """
        process.check(self)
        try:
            self.check(name, timeout)
        except AuthenticationError as error:
            if error.reason != Reason.ANOTHER_PROCESS:
                raise
            return False
        except PeerLost:
            return False
        return True

    def check(self, name: str, timeout: float = 1.0) -> None:
        """Return once the process behind the segment `name` has answered.

        Raises PeerSilent where it does not within `timeout` seconds: it is stopped, busy or cut off, and may come back;
        PeerLost where it has ended; and as `probe`.
        """
        process.check(self)
        self._directory.probe(name, timeout)

    def _fence(self, connection: str, timeout: float) -> bool:
        return all([transport.fence(connection, timeout) for transport in self._transports])

    def _answer(self, request: str) -> dict[str, Any]:
        replies = (transport.answer(request) for transport in self._transports)
        return next((reply for reply in replies if reply is not None), None) or refuse_connection(request)

    # --- end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Withdraw from the metadata store, fail what is under way, end all threads. Idempotent; never raises.

        In a forked child nothing happens: connections, devices and keys are its parent's.
        """
        if self._process is not process.here:
            return
        with self._lock:
            closers, self._closers = self._closers[::-1], []
            self._closed = True
        for segment in self._segments.values():  # all at once: none is waited for before the others know
            _quietly(partial(segment.stop, CLOSED))
        for segment in self._segments.values():
            _quietly(partial(segment.close, CLOSED))
        for closer in closers:
            _quietly(closer)
        self._submitter.close()
        gone, self._registrations = self._registrations, ()  # a closed engine keeps no memory
        release(gone, ())

    def __enter__(self) -> Self:
        process.check(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _quietly(closer: Callable[[], None]) -> None:
    try:
        closer()
    except (OSError, MooncakeError):
        log.exception("closing")
