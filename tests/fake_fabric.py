"""RDMA devices of software in this process, in place of pyverbs: bytes move by memmove, and faults come at will.

`installed()` puts this module where `transports.rdma` looks for its `verbs`, and gives the fabric. Devices are named
as one likes; a key is good only for its own range, rights and device, as with real ones.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import importlib
import itertools
import os
import select
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

from mooncake_hpc.core.errors import DeviceError
from mooncake_hpc.transports.rdma import gid, topology
from mooncake_hpc.transports.rdma import verbs_kernels as layout

PORT_GONE, PORT_BACK, GID_CHANGED = (10,), 9, 18
RETRY_EXCEEDED = 12
STATUS_NAMES = {4: "loc prot err", 5: "wr flush err", 10: "rem access err", 12: "retry exc err"}
POST = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
NOTIFY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
PACKAGE = "mooncake_hpc.transports.rdma"


@dataclass(frozen=True)
class Port:
    active: bool
    mtu: int = 4096
    lid: int = 0
    max_message: int = 1 << 30


@dataclass(frozen=True)
class Link:
    number: int
    gid: bytes
    lid: int
    gid_index: int
    mtu: int
    traffic_class: int
    service_level: int
    pkey_index: int


@dataclass(frozen=True)
class Calls:
    qp: int
    post: int
    cq: int
    poll: int
    notify: int


@dataclass
class Fabric:
    """All devices. `held`: work requests stay under way until `release`."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    down: set[str] = field(default_factory=set)
    dead_paths: set[tuple[str, str]] = field(default_factory=set)  # (from, to): posts end in retry exceeded
    held: bool = False
    silent: bool = False  # queue pairs in ERR give nothing back
    post_seconds: float = 0.0  # that a call of post_send takes
    refuse_posts: int = 0  # so many calls of post_send fail, with all but their first request left out
    gid_indices: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by device; most have 1, 2, 3
    bad_gid_indices: dict[str, set[int]] = field(default_factory=dict)  # by device
    unreachable: set[bytes] = field(default_factory=set)  # GIDs that nothing connects to
    lengths: list[int] = field(default_factory=list)  # of all that was carried
    carried: collections.Counter[str] = field(default_factory=collections.Counter)  # bytes by sending device
    devices: list[Device] = field(default_factory=list)
    pairs: dict[int, QueuePair] = field(default_factory=dict)
    queues: dict[int, CompletionQueue] = field(default_factory=dict)
    regions: dict[int, Region] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(100))
    links: list[Link] = field(default_factory=list)
    registering: Callable[[str, int, int], None] = lambda device, address, length: None  # called in each registration

    def unplug(self, name: str) -> None:
        self.down.add(name)
        self._tell(name, PORT_GONE[0])

    def plug(self, name: str) -> None:
        self.down.discard(name)
        self._tell(name, PORT_BACK)

    def change_gids(self, name: str, *indices: int) -> None:
        self.gid_indices[name] = indices
        self._tell(name, GID_CHANGED)

    def release(self) -> None:
        """Let what is held go on."""
        with self.lock:
            self.held = False
            for pair in list(self.pairs.values()):
                pair.work()

    def _tell(self, name: str, event: int) -> None:
        for device in self.devices:
            if device.name == name:
                device.happened.append(event)
                os.eventfd_write(device.bell, 1)


fabric = Fabric()


@dataclass
class Region:
    device: str
    start: int
    end: int
    writable: bool
    peers_read: bool
    peers_write: bool
    relaxed: bool
    lkey: int = 0

    @property
    def rkey(self) -> int:
        return self.lkey

    def close(self) -> None:
        with fabric.lock:
            fabric.regions.pop(self.lkey, None)


class Device:
    max_depth, max_completions, max_reads = 1 << 14, 1 << 16, 16
    max_region = 1 << 40

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.happened: collections.deque[int] = collections.deque()
        fabric.devices.append(self)

    def port(self) -> Port:
        return Port(self.name not in fabric.down)

    def gids(self) -> list[gid.Gid]:
        indices = fabric.gid_indices.get(self.name, (1, 2, 3))
        return [gid.Gid(index, bytes([index]) * 15 + b"\x01") for index in indices]

    def register(
        self, address: int, length: int, writable: bool, peers_read: bool, peers_write: bool, relaxed: bool
    ) -> Region:
        fabric.registering(self.name, address, length)
        rights = writable, peers_read, peers_write
        region = Region(self.name, address, address + length, *rights, relaxed, next(fabric.numbers))
        fabric.regions[region.lkey] = region
        return region

    def queue(self, depth: int) -> CompletionQueue:
        return CompletionQueue(depth)

    def queue_pair(self, queue: CompletionQueue, depth: int) -> QueuePair:
        return QueuePair(self.name, queue, depth)

    def events(self, wake: int) -> Iterator[int]:
        poller = select.poll()
        poller.register(self.bell, select.POLLIN)
        poller.register(wake, select.POLLIN)
        while not any(ready == wake for ready, _ in poller.poll()):
            os.eventfd_read(self.bell)
            while self.happened:
                yield self.happened.popleft()

    def close(self) -> None:
        fabric.devices.remove(self)
        os.close(self.bell)


class CompletionQueue:
    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.done: collections.deque[tuple[int, int]] = collections.deque()  # work request, status
        self.armed = False
        self.drained = 0
        self.handle = next(fabric.numbers)
        fabric.queues[self.handle] = self

    def push(self, number: int, status: int) -> None:
        assert len(self.done) < self.depth, "completion queue overrun"
        self.done.append((number, status))
        if self.armed:
            self.armed = False
            os.eventfd_write(self.fd, 1)

    def drain_events(self) -> None:
        self.drained += 1
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        fabric.queues.pop(self.handle, None)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class QueuePair:
    def __init__(self, device: str, queue: CompletionQueue, depth: int) -> None:
        self.device, self.queue, self.depth = device, queue, depth
        self.number = next(fabric.numbers)
        self.peer = 0
        self.broken = False
        self.waiting: collections.deque[Work] = collections.deque()
        fabric.pairs[self.number] = self

    def connect(self, link: Link) -> None:
        if link.gid_index in fabric.bad_gid_indices.get(self.device, ()) or link.gid in fabric.unreachable:
            raise DeviceError(f"{self.device}: no route with GID index {link.gid_index}", errno.EINVAL)
        fabric.links.append(link)
        self.peer = link.number

    def to_error(self) -> None:
        with fabric.lock:
            self.broken = True
            self.work()

    def close(self) -> None:
        with fabric.lock:
            self.waiting.clear()
            fabric.pairs.pop(self.number, None)

    def calls(self) -> Calls:
        addresses = [int(ctypes.cast(f, ctypes.c_void_p).value or 0) for f in (post_send, poll_cq, notify_cq)]
        return Calls(self.number, addresses[0], self.queue.handle, addresses[1], addresses[2])

    def work(self) -> None:
        """Carry out what waits, as far as it may."""
        while self.waiting and not (fabric.silent and self.broken):
            if fabric.held and not self.broken:
                return
            self._next()

    def advance(self, count: int) -> None:
        """Carry out so many of those that are held."""
        for _ in range(min(count, len(self.waiting))):
            self._next()

    def fail(self, landed: bool) -> None:
        """The first of those that are held gets no answer, though its bytes may be there: the others are flushed."""
        work = self.waiting.popleft()
        if landed:
            self._carry(work)
        self.broken = True
        self.queue.push(work.number, RETRY_EXCEEDED)
        self.work()

    def _next(self) -> None:
        work = self.waiting.popleft()
        status = layout.FLUSHED if self.broken else self._carry(work)
        if status != layout.SUCCESS:
            self.broken = True
        if status != layout.SUCCESS or work.signalled:
            self.queue.push(work.number, status)

    def _carry(self, work: Work) -> int:
        other = fabric.pairs.get(self.peer)
        if other is None or other.peer != self.number or other.broken:
            return RETRY_EXCEEDED
        if {self.device, other.device} & fabric.down or (self.device, other.device) in fabric.dead_paths:
            return RETRY_EXCEEDED
        ours, theirs = fabric.regions.get(work.lkey), fabric.regions.get(work.rkey)
        writing = work.opcode == layout.RDMA_WRITE
        if not ours or not self._allowed(ours, self.device, work.local, work.length, not writing):
            return layout.LOCAL_PROTECTION
        if (
            not theirs
            or not (theirs.peers_write if writing else theirs.peers_read)
            or not self._allowed(theirs, other.device, work.remote, work.length, writing)
        ):
            other.to_error()
            return layout.REMOTE_ACCESS
        source, target = (work.local, work.remote) if writing else (work.remote, work.local)
        ctypes.memmove(target, source, work.length)
        fabric.carried[self.device] += work.length
        fabric.lengths.append(work.length)
        return layout.SUCCESS

    @staticmethod
    def _allowed(region: Region, device: str, address: int, length: int, write: bool) -> bool:
        inside = region.start <= address and address + length <= region.end
        return region.device == device and inside and (region.writable or not write)


@dataclass
class Work:
    number: int
    opcode: int
    signalled: bool
    local: int
    length: int
    lkey: int
    remote: int
    rkey: int

    @classmethod
    def at(cls, address: int) -> Work:
        sge = word(address + layout.WR_SGES)
        length_key = word(sge + layout.SGE_LENGTH_KEY)
        head = word(address + layout.WR_COUNT_OPCODE)
        assert head & 0xFFFFFFFF == 1
        return cls(
            word(address + layout.WR_ID), head >> 32, bool(word(address + layout.WR_FLAGS) & layout.SIGNALED),
            word(sge + layout.SGE_ADDRESS), length_key & 0xFFFFFFFF, length_key >> 32,
            word(address + layout.WR_REMOTE), word(address + layout.WR_KEY) & 0xFFFFFFFF,
        )  # fmt: skip


def word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


@POST
def post_send(handle: int, address: int, bad: int) -> int:
    if fabric.post_seconds:
        time.sleep(fabric.post_seconds)
    with fabric.lock:
        pair = fabric.pairs[handle]
        first = True
        while address:
            if fabric.refuse_posts and not first:
                fabric.refuse_posts -= 1
                ctypes.c_int64.from_address(bad).value = address
                return errno.ENOMEM
            assert len(pair.waiting) < pair.depth, "send queue overrun"
            pair.waiting.append(Work.at(address))
            address, first = word(address + layout.WR_NEXT), False
        pair.work()
    return 0


@POST
def poll_cq(handle: int, most: int, address: int) -> int:
    with fabric.lock:
        queue = fabric.queues[handle]
        count = min(most & 0xFFFFFFFF, len(queue.done))
        for index in range(count):
            number, status = queue.done.popleft()
            at = address + layout.WC * index
            ctypes.c_uint64.from_address(at + layout.WC_ID).value = number
            ctypes.c_uint32.from_address(at + layout.WC_STATUS).value = status
    return count


@NOTIFY
def notify_cq(handle: int, _solicited: int) -> int:
    with fabric.lock:
        queue = fabric.queues[handle]
        queue.armed = True
    return 0


def candidates(_device: str, _port: int, _settings: object, *, table: list[gid.Gid]) -> list[gid.Gid]:
    """In the table's order."""
    return table


@contextlib.contextmanager
def installed() -> Iterator[Fabric]:
    """The package's modules loaded anew over this one, and thrown away at the end."""
    global fabric
    fabric = Fabric()
    ours = types.ModuleType(f"{PACKAGE}.verbs")
    ours.__dict__.update({k: v for k, v in globals().items() if not k.startswith("__")})
    hidden = {name: module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.")}
    kept = f"{PACKAGE}.gid", f"{PACKAGE}.topology"
    try:
        for name in hidden:
            if name not in kept:
                del sys.modules[name]
        sys.modules[f"{PACKAGE}.verbs"] = ours
        package = importlib.import_module(PACKAGE)
        previous = getattr(package, "verbs", None)
        package.verbs = ours  # type: ignore[attr-defined]
        with mock.patch.object(topology, "load", load), mock.patch.object(gid, "candidates", candidates):
            yield fabric
    finally:
        for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.") and name not in kept]:
            del sys.modules[name]
        sys.modules.update(hidden)
        package.verbs = previous  # type: ignore[attr-defined]


def load(device_name: str, matrix_file: str, settings: object) -> topology.Topology:
    """Whatever devices are named are there."""
    if matrix_file:
        with open(matrix_file) as file:
            return topology.parse(file.read(), matrix_file)
    names = tuple(device_name.split(","))
    return topology.Topology({"cpu:0": (names, ()), "cpu:1": (names, ())})
