"""From a request array to the parts of a batch: which route takes what, cut where."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mooncake_hpc.batch import REQUEST, WRITE, Batch, Requests
from mooncake_hpc.errors import AddressRejected, ConfigError, PeerLost
from mooncake_hpc.kernels import lane as layout
from mooncake_hpc.kernels import ranges
from mooncake_hpc.remote import Segment
from mooncake_hpc.transports.base import Route, Tables
from mooncake_hpc.transports.lane import Lane

Part = tuple[Lane, int, int]  # lane, address of slices, their number
Slices = npt.NDArray[np.int64]

SPARE = 16  # slices beyond one a request, for those that cross a border


class Slicer:
    """Policy of `TransferEngine.submit`: the first route that reaches all of a segment's requests takes them."""

    def prepare(
        self, requests: Requests, segments: Mapping[int, Segment], local: Tables
    ) -> tuple[Batch, list[Part], list[object]]:
        """The batch, its parts, and what must live as long. Raises AddressRejected, ConfigError, PeerLost."""
        if not isinstance(requests, np.ndarray) or requests.dtype != REQUEST or requests.ndim != 1:
            raise ConfigError("submit() takes a one-dimensional array of dtype mooncake_hpc.batch.REQUEST")
        batch = Batch(requests.copy())
        parts: list[Part] = []
        held: list[object] = [local]
        if len(requests) == 0:
            return batch, parts, held
        first = int(requests[0]["target_id"])
        others = self._add(batch, first, segments, local, parts, held)
        if others:
            for target in np.unique(requests["target_id"]):
                if target != first:
                    self._add(batch, int(target), segments, local, parts, held)
        return batch, parts, held

    def _add(
        self,
        batch: Batch,
        target: int,
        segments: Mapping[int, Segment],
        local: Tables,
        parts: list[Part],
        held: list[object],
    ) -> int:
        """Add the parts of one target; how many requests go elsewhere."""
        segment = segments.get(target)
        if segment is None:
            raise ConfigError(f"no segment has the id {target}: use the id of a Segment that open_segment() returned")
        for attempt in (0, 1):
            for route in segment.routes:
                code, slices = _cut(batch.requests, batch, target, route, local)
                if code >= 0:
                    held += [slices, route.tables]
                    _share(route, slices, code, parts)
                    return batch.others
                if (-code) % ranges.REASONS != ranges.REMOTE_UNREGISTERED:
                    _refuse(batch, code, segment)
            if len(segment.routes) > 1 and self._mixed(batch, target, segment, local, parts, held):
                return int((batch.requests["target_id"] != target).sum())
            if attempt == 0:
                segment.refresh()
        return _refuse(batch, code, segment)

    def _mixed(
        self, batch: Batch, target: int, segment: Segment, local: Tables, parts: list[Part], held: list[object]
    ) -> bool:
        """Share the segment's requests among its routes; False where some are out of reach of all."""
        requests = batch.requests.copy()
        pairs = np.array([route.tables.address for route in segment.routes], np.int64)
        address = int(requests.ctypes.data)
        if ranges.assign(address, len(requests), target, int(pairs.ctypes.data), len(pairs)):
            return False
        for number, route in enumerate(segment.routes):
            code, slices = _cut(requests, batch, -2 - number, route, local)
            if code < 0:
                _refuse(batch, code, segment)
            held += [slices, route.tables]
            _share(route, slices, code, parts)
        return True


def _cut(requests: Requests, batch: Batch, target: int, route: Route, local: Tables) -> tuple[int, Slices]:
    room = len(requests) + SPARE
    while True:
        slices = np.empty(4 * room, np.int64)
        code = ranges.cut(
            requests.ctypes.data,
            len(requests),
            target,
            local.address,
            route.tables.address,
            route.slice_limit,
            slices.ctypes.data,
            room,
            batch.address,
            route.fence_byte,
        )
        if code >= 0 or -code % ranges.REASONS != ranges.NO_ROOM:
            return code, slices
        room *= 4


def _share(route: Route, slices: Slices, count: int, parts: list[Part]) -> None:
    """Give each lane of the route a run of the slices."""
    lanes = route.lanes
    address = int(slices.ctypes.data)
    if len(lanes) == 1:
        if count:
            parts.append((lanes[0], address, count))
        return
    used = min(len(lanes), count)
    for number in range(used):
        begin, end = number * count // used, (number + 1) * count // used
        parts.append((lanes[number], address + begin * layout.SLICE, end - begin))


def _refuse(batch: Batch, code: int, segment: Segment) -> int:
    index, reason = divmod(-code, ranges.REASONS)
    request = batch.requests[index]
    opcode, length = int(request["opcode"]), int(request["length"])
    ours, theirs = int(request["local_addr"]), int(request["remote_addr"])
    where = f"request {index} to segment {segment.name!r}"
    if reason == ranges.BAD_OPCODE:
        raise ConfigError(f"{where}: opcode {opcode} is neither READ (0) nor WRITE (1)")
    if reason == ranges.BAD_LENGTH:
        raise ConfigError(f"{where}: length {length} is above 2**63")
    if reason == ranges.LOCAL_UNREGISTERED:
        need = "registered here" if opcode == WRITE else "registered here and writable"
        raise AddressRejected(f"{where}: our memory {ours:#x}+{length} is not {need}: allocate() or register() it")
    writable = " writable" if opcode == WRITE else ""
    if not segment.routes:
        raise PeerLost(f"{where}: no route")
    raise AddressRejected(
        f"{where}: no{writable} buffers of the {len(segment.buffers)} published hold {theirs:#x}+{length}"
        f" (transport {segment.transport})"
    )
