"""The one module that imports pyverbs (of rdma-core 44 to 65): devices, memory regions, queue pairs, their pointers.

pyverbs hands out no usable pointers before rdma-core 61. But in every release from 25 on an object's first C field,
right behind what it inherits from PyverbsCM, is the pointer to its struct. `QueuePair.calls` reads it there and checks
it against all that pyverbs says publicly; where the two differ, pyverbs' own calls take the pointers' place.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import select
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyverbs import fork
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.base import PyverbsCM
from pyverbs.cq import CQ, CompChannel
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsError
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

from mooncake_hpc.core.errors import DeviceError
from mooncake_hpc.transports.rdma import verbs_kernels as layout
from mooncake_hpc.transports.rdma.fallback import Callbacks
from mooncake_hpc.transports.rdma.gid import ROCE_V1_OR_IB, ROCE_V2, Gid
from mooncake_hpc.transports.rdma.library import Region, peek

try:
    import pyverbs.libibverbs_enums as enums  # from rdma-core 59 on
except ImportError:
    import pyverbs.enums as enums

log = logging.getLogger(__name__)

REMOTE = enums.IBV_ACCESS_REMOTE_READ | enums.IBV_ACCESS_REMOTE_WRITE
QP_ACCESS = enums.IBV_ACCESS_LOCAL_WRITE | REMOTE | enums.IBV_ACCESS_REMOTE_ATOMIC
MAX_READS = 16  # READs under way a queue pair, as the original
RNR_TIMER, RNR_RETRIES, HOP_LIMIT = 12, 7, 16  # as the original
# 4.096 us << 16 is 0.27 s, so a dead peer shows after 2 s. The original has 14 and 7, but 7 means for ever to soft-RoCE
ACK_TIMEOUT, RETRIES = 16, 6
MOST_GIDS = 1024  # that are in use; the kernel takes 2047 at most
FORK_DISABLED = 0  # enum ibv_fork_status; a kernel that copies pinned pages at a fork says 2, not needed
PORT_GONE = (enums.IBV_EVENT_PORT_ERR, enums.IBV_EVENT_DEVICE_FATAL)
PORT_BACK = enums.IBV_EVENT_PORT_ACTIVE
GID_CHANGED = enums.IBV_EVENT_GID_CHANGE
STATUS_NAMES = {
    getattr(enums, name): name.removeprefix("IBV_WC_").replace("_", " ").lower()
    for name in dir(enums)
    if name.startswith("IBV_WC_") and name.endswith(("_ERR", "_SUCCESS"))
}


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """An error of pyverbs or the system becomes a DeviceError that begins with `what`."""
    try:
        yield
    except PyverbsError as error:
        code = getattr(error, "error_code", 0) or 0
        raise DeviceError(f"{what}: {error}", code) from error
    except OSError as error:
        raise DeviceError(f"{what}: {error.strerror or error}", error.errno or 0) from error


@dataclass(frozen=True, slots=True)
class Port:
    """State of a port as the device tells it."""

    active: bool
    mtu: int  # bytes
    lid: int
    max_message: int


@dataclass(frozen=True, slots=True)
class Link:
    """What the two ends of a queue pair agree on."""

    number: int  # of the peer's queue pair
    gid: bytes
    lid: int
    gid_index: int  # ours
    mtu: int  # bytes
    traffic_class: int
    service_level: int
    pkey_index: int


@dataclass(frozen=True, slots=True)
class Calls:
    """Addresses for a kernel: handle and function of posting, of polling and of asking for an event."""

    qp: int
    post: int
    cq: int
    poll: int
    notify: int


def _gid(entry: Any) -> Gid:
    """Of a pyverbs GIDEntry."""
    kind = ROCE_V2 if entry.gid_type == enums.IBV_GID_TYPE_ROCE_V2 else ROCE_V1_OR_IB
    netdev = ""
    with contextlib.suppress(OSError):  # none, or one of another network namespace
        netdev = socket.if_indextoname(entry.ndev_ifindex)
    return Gid(entry.gid_index, bytes.fromhex(entry.gid_str().replace(":", "")), kind, netdev)


class Device:
    """An opened device with its protection domain."""

    def __init__(self, name: str, port: int) -> None:
        """Raises DeviceError."""
        self.name, self._port = name, port
        # whoever closes a queue pair or queue waits, with the GIL held, until its events are acknowledged
        self.lock = threading.Lock()
        if fork.is_fork_initialized() == FORK_DISABLED:
            with contextlib.suppress(PyverbsError):  # too late: regions of somebody else's exist already
                fork.fork_init()
        with explained(f"RDMA device {name} cannot be opened"):
            self._context = Context(name=name)
            self._pd = PD(self._context)
            limits = self._context.query_device()
        _handles.update({self._context, self._pd})
        self.max_region = int(limits.max_mr_size)
        self.max_depth = int(limits.max_qp_wr)
        self.max_completions = int(limits.max_cqe)
        self.max_reads = min(MAX_READS, int(limits.max_qp_rd_atom) or 1)

    def port(self) -> Port:
        """Raises DeviceError."""
        with explained(f"RDMA device {self.name} port {self._port}"):
            state = self._context.query_port(self._port)
        active = state.state == enums.IBV_PORT_ACTIVE
        return Port(active, 128 << int(state.active_mtu), int(state.lid), int(state.max_msg_sz))

    def gids(self) -> list[Gid]:
        """The used entries of the port's GID table, by index. Raises DeviceError."""
        with explained(f"RDMA device {self.name}: its GID table"):
            entries = self._context.query_gid_table(MOST_GIDS)
        return sorted((_gid(entry) for entry in entries if entry.port_num == self._port), key=lambda gid: gid.index)

    def register(
        self, address: int, length: int, writable: bool, peers_read: bool, peers_write: bool, relaxed: bool
    ) -> Region | MR:
        """A memory region with `lkey`, `rkey` and `close()`; other threads run meanwhile. Raises DeviceError.

        `peers_write` demands `writable` (ibv_reg_mr(3)).
        """
        access = enums.IBV_ACCESS_LOCAL_WRITE if writable else 0
        if peers_read:
            access |= enums.IBV_ACCESS_REMOTE_READ
        if peers_write:
            access |= enums.IBV_ACCESS_REMOTE_WRITE
        if relaxed:
            access |= enums.IBV_ACCESS_RELAXED_ORDERING
        with explained(f"RDMA device {self.name} cannot register {length} bytes at {address:#x}"):
            pd = matching(self._pd, (layout.PD_CONTEXT, 8, self._context))
            if pd:
                return Region(pd, address, length, access)
            return MR(self._pd, length, access, address=address)

    def queue(self, depth: int) -> CompletionQueue:
        """Raises DeviceError."""
        return CompletionQueue(self, self._context, min(depth, self.max_completions))

    def queue_pair(self, queue: CompletionQueue, depth: int) -> QueuePair:
        """Raises DeviceError."""
        return QueuePair(self, self._context, self._pd, queue, depth, self._port)

    def events(self, wake: int) -> Iterator[int]:
        """The context's asynchronous events, as enum ibv_event_type, until `wake` is readable."""
        context = matching(self._context, (layout.CONTEXT_COMMAND_FD, 4, self._context.cmd_fd))
        if not context:
            log.warning("RDMA device %s: struct ibv_context is not as expected: no events", self.name)
            return
        fd = peek(context + layout.CONTEXT_ASYNC_FD, 4)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NONBLOCK)
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(wake, select.POLLIN)
        while not any(ready == wake for ready, _ in poller.poll()):
            kind = self._event()
            if kind is None:  # there was none, or the device is gone and poll() returns at once from now on
                time.sleep(0.05)
            else:
                yield kind

    def _event(self) -> int | None:
        with self.lock:
            try:
                event = self._context.get_async_event()
            except PyverbsError:
                return None
            kind = int(event.event_type)
            event.ack()
            return kind

    def close(self) -> None:
        """Releases everything that was made of it."""
        with explained(f"closing RDMA device {self.name}"):
            self._pd.close()
            self._context.close()


class CompletionQueue:
    """A completion queue and its event channel."""

    def __init__(self, device: Device, context: Context, depth: int) -> None:
        self._device = device
        with explained(f"RDMA device {device.name}: completion queue of {depth}"):
            self.channel = CompChannel(context)
            self.cq = CQ(context, depth, None, self.channel, 0)
        _handles.update({self.channel, self.cq})
        self.fd = -1  # of the channel; -1: not known, so that there are no events
        channel = matching(self.channel, (layout.CHANNEL_CONTEXT, 8, context))
        if channel:
            self.fd = peek(channel + layout.CHANNEL_FD, 4)
            fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) | os.O_NONBLOCK)

    def drain_events(self) -> None:
        """Take the events that only served to wake somebody, so that they do not pile up."""
        with contextlib.suppress(PyverbsError):
            while self.fd >= 0:
                self.channel.get_cq_event(self.cq)

    def close(self) -> None:
        with self._device.lock, explained(f"RDMA device {self._device.name}: closing a completion queue"):
            self.cq.close()
            self.channel.close()


class QueuePair:
    """A reliable connection's end."""

    def __init__(self, device: Device, context: Context, pd: PD, queue: CompletionQueue, depth: int, port: int) -> None:
        self._device, self._port = device, port
        self._owners = context, pd, queue.cq
        capacity = QPCap(max_send_wr=depth, max_recv_wr=1, max_send_sge=1, max_recv_sge=1, max_inline_data=0)
        init = QPInitAttr(qp_type=enums.IBV_QPT_RC, scq=queue.cq, rcq=queue.cq, cap=capacity, sq_sig_all=0)
        with explained(f"RDMA device {device.name}: queue pair of {depth} work requests"):
            self._qp = QP(pd, init)
        _handles.add(self._qp)
        self.number = int(self._qp.qp_num)
        self._callbacks: Callbacks | None = None
        self._lock, self._closed = threading.Lock(), False

    def connect(self, link: Link) -> None:
        """RESET to RTS. Raises DeviceError; its code is EINVAL where the GID or the peer's address does not do."""
        attributes = QPAttr(port_num=self._port)
        attributes.pkey_index = link.pkey_index
        attributes.qp_access_flags = QP_ACCESS
        attributes.dest_qp_num = link.number
        attributes.path_mtu = (link.mtu // 128).bit_length() - 1  # enum ibv_mtu: 256 is 1
        attributes.rq_psn = attributes.sq_psn = 0
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = self._device.max_reads
        attributes.min_rnr_timer, attributes.timeout = RNR_TIMER, ACK_TIMEOUT
        attributes.retry_cnt, attributes.rnr_retry = RETRIES, RNR_RETRIES
        route = GlobalRoute(
            dgid=GID(link.gid.hex(":", 2)),
            sgid_index=link.gid_index,
            hop_limit=HOP_LIMIT,
            traffic_class=link.traffic_class,
        )
        attributes.ah_attr = AHAttr(port_num=self._port, is_global=1, gr=route, dlid=link.lid, sl=link.service_level)
        with explained(
            f"RDMA device {self._device.name} port {self._port}: queue pair {self.number} to {link.number} at"
            f" {link.gid.hex(':', 2)} with GID index {link.gid_index}, MTU {link.mtu}"
        ):
            self._qp.to_rts(attributes)

    def to_error(self) -> None:
        """Whatever is under way is flushed. Idempotent; never raises."""
        with self._lock:  # pyverbs would crash on a closed one
            if self._closed:
                return
            try:
                self._qp.modify(QPAttr(qp_state=enums.IBV_QPS_ERR), enums.IBV_QP_STATE)
            except PyverbsError as error:
                log.debug("queue pair %d to ERR: %s", self.number, error)

    def calls(self) -> Calls:
        """What a kernel posts and polls with."""
        global pointers_work
        context, pd, cq = self._owners
        qp = matching(
            self._qp,
            (layout.QP_CONTEXT, 8, context),
            (layout.QP_PD, 8, pd),
            (layout.QP_SEND_CQ, 8, cq),
            (layout.QP_NUMBER, 4, self.number),
        )
        queue = matching(cq, (layout.CQ_CONTEXT, 8, context))
        verbs = matching(context, (layout.CONTEXT_COMMAND_FD, 4, context.cmd_fd))
        if qp and queue and verbs:
            post, poll, notify = (
                peek(verbs + offset, 8) for offset in (layout.CONTEXT_POST, layout.CONTEXT_POLL, layout.CONTEXT_NOTIFY)
            )
            return Calls(qp, post, queue, poll, notify)
        if pointers_work:
            pointers_work = False
            warnings.warn("pyverbs' objects are not as expected: RDMA goes through its slow calls", stacklevel=2)
        self._callbacks = Callbacks(self._qp, cq, SendWR, SGE)
        return Calls(0, self._callbacks.post, 0, self._callbacks.poll, self._callbacks.notify)

    def close(self) -> None:
        what = f"RDMA device {self._device.name}: closing queue pair {self.number}"
        with self._lock, self._device.lock, explained(what):
            self._closed = True
            self._qp.close()


pointers_work = True
_handles: weakref.WeakSet[Any] = weakref.WeakSet()  # what closes itself when it is deleted


def _keep_from_child() -> None:
    """A forked child shares the device's file: no handle may be closed there, not even when the child ends."""
    for handle in list(_handles):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))


os.register_at_fork(after_in_child=_keep_from_child)


def matching(obj: Any, *facts: tuple[int, int, Any]) -> int:
    """The struct behind a pyverbs object if it is as expected: each fact an offset, a size, and a number or the
    pyverbs object that it points to. 0 where it is not, or pointers are not to be used."""
    try:
        address = address_of(obj) if pointers_work else 0
        right = all(
            peek(address + offset, size) == (value if isinstance(value, int) else address_of(value))
            for offset, size, value in facts
            if address
        )
    except OSError:
        return 0
    return address if right else 0


def address_of(obj: Any) -> int:
    """The struct behind a pyverbs object."""
    for kind, attribute in ((QP, "qp"), (CQ, "cq"), (Context, "context"), (PD, "pd")):
        if isinstance(obj, kind) and hasattr(QP, "qp"):  # before rdma-core 61 the others must not be touched
            return int(getattr(obj, attribute))
    return peek(id(obj) + PyverbsCM.__basicsize__, 8)
