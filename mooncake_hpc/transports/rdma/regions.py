"""Registered memory: a region on every device, larger memory in several, and their keys for kernels and peers."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import resource
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mooncake_hpc.core.errors import RegistrationError
from mooncake_hpc.core.settings import RdmaSettings
from mooncake_hpc.native import prepare, ranges
from mooncake_hpc.transports.base import Registration
from mooncake_hpc.transports.rdma.nic import Nic
from mooncake_hpc.transports.rdma.topology import Topology
from mooncake_hpc.wire.descriptor import BufferDescriptor, SegmentDescriptor

log = logging.getLogger(__name__)

CAP_IPC_LOCK = 14
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # from Linux 5.14 on
LARGE = 64 << 20  # bytes from which on several threads fault memory in and register it, one a device
Row = tuple[int, int, Sequence[int], bool]  # start, end, (bits of near devices, keys by device), read-only
Key = tuple[int, int, bool, bool, bool]  # address, length, read-only, remote, read-only for peers


class KeyTables:
    """A pair of keyed tables, readable and writable; `address` stays the same while the tables are replaced."""

    def __init__(self, unused: Callable[[object], None]) -> None:
        """`unused` is handed tables that kernels may still look at for a moment."""
        self.pair = np.zeros(2, np.int64)
        self.address = int(self.pair.ctypes.data)
        self._tables: tuple[Any, Any] | None = None
        self._unused = unused
        self.fill(())

    def fill(self, rows: Iterable[Row]) -> object:
        """Replace the tables; the old ones, for whoever has their addresses."""
        rows = list(rows)
        readable = ranges.keyed((start, end, row) for start, end, row, _ in rows)
        writable = ranges.keyed((start, end, row) for start, end, row, readonly in rows if not readonly)
        old, self._tables = self._tables, (readable, writable)
        self.pair[:] = [readable.ctypes.data, writable.ctypes.data]
        if old is not None:
            self._unused(old)
        return old


@dataclass(frozen=True, slots=True)
class Piece:
    """At most a region's worth of registered memory, and its regions by device."""

    start: int
    end: int
    regions: list[Any]

    @property
    def lkeys(self) -> tuple[int, ...]:
        return tuple(int(region.lkey) for region in self.regions)

    @property
    def rkeys(self) -> tuple[int, ...]:
        return tuple(int(region.rkey) for region in self.regions)


class Regions:
    """The regions of all registrations on all devices. The caller serialises `update`."""

    def __init__(
        self, nics: Sequence[Nic], topology: Topology, settings: RdmaSettings, unused: Callable[[object], None]
    ) -> None:
        self._nics, self._topology, self._settings = nics, topology, settings
        self.tables = KeyTables(unused)
        self._pieces: dict[Key, list[Piece]] = {}
        self._most = min([settings.max_mr_size, *(nic.device.max_region for nic in nics)]) & -4096

    def update(self, registrations: Sequence[Registration]) -> None:
        """Have exactly these registered. Raises RegistrationError, with nothing changed."""
        wanted = {_key(r): r for r in registrations}
        made: dict[Key, list[Piece]] = {}
        missing = [key for key in wanted if key not in self._pieces]
        _check_locked_memory(sum(length for _, length, *_ in missing) * len(self._nics))
        try:
            for key in missing:
                made[key] = []
                self._register(key, made[key])
        except BaseException:
            _release(piece for pieces in made.values() for piece in pieces)
            raise
        gone = [piece for key, pieces in self._pieces.items() if key not in wanted for piece in pieces]
        self._pieces = {key: made.get(key) or self._pieces[key] for key in wanted}
        self.tables.fill(row for key, r in wanted.items() for row in self._rows(key, r.location))
        _release(gone)

    def describe(self, buffers: Iterable[BufferDescriptor]) -> tuple[BufferDescriptor, ...]:
        """The buffers with their keys; those of several regions as several."""
        return tuple(
            replace(b, address=p.start, length=p.end - p.start, lkeys=p.lkeys, rkeys=p.rkeys)
            for b in buffers
            for p in self._pieces_for_peers(b)
        )

    def _pieces_for_peers(self, buffer: BufferDescriptor) -> Iterable[Piece]:
        keys = ((buffer.address, buffer.length, ours, True, buffer.readonly) for ours in (False, True))
        return next((self._pieces[key] for key in keys if key in self._pieces), ())

    def close(self) -> None:
        pieces, self._pieces = self._pieces, {}
        self.tables.fill(())
        _release(piece for several in pieces.values() for piece in several)

    def _register(self, key: Key, pieces: list[Piece]) -> None:
        address, length, readonly, _, _ = key
        for start in range(address, address + length, self._most):
            piece = Piece(start, min(start + self._most, address + length), [])
            pieces.append(piece)
        places = [(nic, piece) for piece in pieces for nic in self._nics]
        calls = [partial(self._region, nic, piece, key) for nic, piece in places]
        if length >= LARGE:
            with ThreadPoolExecutor(max(_cores(), len(self._nics)), "mooncake-register") as threads:
                _fault_in(threads, address, length, not readonly)
                outcomes = list(threads.map(_outcome, calls))
        else:  # threads would take longer to start
            outcomes = [_outcome(call) for call in calls]
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        for (_, piece), outcome in zip(places, outcomes, strict=True):
            if not isinstance(outcome, Exception):
                piece.regions.append(outcome)
        if failures:
            raise RegistrationError(f"{failures[0]}{_memlock_hint()}") from failures[0]

    def _region(self, nic: Nic, piece: Piece, key: Key) -> Any:
        _, _, readonly, remote, readonly_for_peers = key
        peers_write = remote and not readonly_for_peers
        relaxed = self._settings.relaxed_ordering
        return nic.device.register(piece.start, piece.end - piece.start, not readonly, remote, peers_write, relaxed)

    def _rows(self, key: Key, location: str) -> Iterable[Row]:
        near, _ = self._topology.choices(location)
        bits = sum(1 << nic.index for nic in self._nics if nic.name in near)
        for piece in self._pieces[key]:
            yield piece.start, piece.end, (bits, *piece.lkeys), key[2]


def remote_rows(descriptor: SegmentDescriptor) -> Iterable[Row]:
    """The rows of a peer's buffers, of those that have a key for each of its devices."""
    names = [device.name for device in descriptor.devices]
    for buffer in descriptor.buffers:
        if len(buffer.rkeys) != len(names):
            continue
        choices = descriptor.priority_matrix.get(buffer.name) or [names]
        bits = sum(1 << index for index, name in enumerate(names) if name in choices[0])
        yield buffer.address, buffer.address + buffer.length, (bits, *buffer.rkeys), buffer.readonly


def _outcome(call: Callable[[], Any]) -> Any:
    """What it returns or raises."""
    try:
        return call()
    except Exception as error:
        return error


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _fault_in(threads: ThreadPoolExecutor, address: int, length: int, writable: bool) -> None:
    """Have all pages there, by all our cores: a device's registration would do it by one, and that takes far longer
    than the rest of it."""
    start, end = address & -mmap.PAGESIZE, -(-(address + length) // mmap.PAGESIZE) * mmap.PAGESIZE
    share = -(-(end - start) // _cores() // mmap.PAGESIZE) * mmap.PAGESIZE
    parts = range(start, end, share)
    list(threads.map(lambda part: _populate(part, min(share, end - part), writable), parts))


def _populate(start: int, length: int, writable: bool) -> None:
    """Whole pages. What cannot be there is left to the registration, which says why."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    advice = MADV_POPULATE_WRITE if writable else MADV_POPULATE_READ
    if madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice) != 0 and ctypes.get_errno() == errno.EINVAL:
        prepare.touch_range(start, length, int(writable))  # by a kernel that does not know it


def _key(registration: Registration) -> Key:
    r = registration
    return r.address, r.length, r.readonly, r.remote_accessible, r.readonly_for_peers


def _release(pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        for region in piece.regions:
            try:
                region.close()
            except Exception as error:  # pyverbs' own kind
                log.warning("a memory region of %d bytes stays registered: %s", piece.end - piece.start, error)


def _check_locked_memory(more: int) -> None:
    """Raise RegistrationError when so much more memory may not be locked; the kernel would only say ENOMEM."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if more == 0 or limit == resource.RLIM_INFINITY:
        return
    fields = _status()
    if int(fields.get("CapEff", "0"), 16) >> CAP_IPC_LOCK & 1:
        return
    locked = int(fields.get("VmPin", "0 kB").split()[0]) * 1024
    if locked + more > limit:
        raise RegistrationError(
            f"{more} bytes cannot be locked for RDMA: RLIMIT_MEMLOCK (ulimit -l) is {limit} bytes, of which {locked}"
            " are taken; raise it, or run with CAP_IPC_LOCK"
        )


def _memlock_hint() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "" if limit == resource.RLIM_INFINITY else f" (RLIMIT_MEMLOCK, ulimit -l, is {limit} bytes)"


def _status() -> dict[str, str]:
    with open("/proc/self/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
