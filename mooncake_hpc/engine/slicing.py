"""From a batch's requests to its parts where `slice_kernels.submit` does not do: which route takes what; errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.errors import AddressRejected, ConfigError, PeerLost
from mooncake_hpc.core.request import WRITE
from mooncake_hpc.engine import slice_kernels as slicer
from mooncake_hpc.engine.arena import SPARE, Arena
from mooncake_hpc.engine.remote_segment import Segment
from mooncake_hpc.transports import queue_kernels as layout
from mooncake_hpc.transports.base import Route
from mooncake_hpc.transports.queue import Lane

Part = tuple[Lane, int, int]  # lane, address of slices, their number


class Slicing:
    """The parts of one batch. The first route that reaches all requests to a segment takes them."""

    def __init__(self, arena: Arena, local: int) -> None:
        """`local` is the address of our pair of tables."""
        self._arena, self._count, self._local = arena, arena.count, local
        self.parts: list[Part] = []
        self.held: list[npt.NDArray[np.int64]] = []  # the parts' slices

    def run(self, segments: Mapping[int, Segment], replaced: Mapping[int, str]) -> None:
        """Make the parts. Raises AddressRejected, ConfigError, PeerLost, MetadataError."""
        slicer.reset(self._arena.address, self._count)
        targets = self._arena.requests["target_id"][: self._count]
        for target in np.unique(targets).tolist():
            segment = segments.get(target)
            if segment is None and target in replaced:
                raise PeerLost(f"the process of segment {replaced[target]!r} was replaced: open the segment again")
            if segment is None:
                raise ConfigError(f"no segment has the id {target}: use that of a Segment that open_segment() returned")
            if not self._add(target, segment):
                segment.refresh()
                if not self._add(target, segment):
                    self._refuse(self._missing, segment)

    def _add(self, target: int, segment: Segment) -> bool:
        """Add the parts of one target; False when an address is in none of its routes' tables."""
        for route in segment.routes:
            code, slices = self._cut(target, route)
            if code >= 0:
                self._share(route, slices, code)
                return True
            if -code % slicer.REASONS != slicer.REMOTE_UNREGISTERED:
                self._refuse(code, segment)
            self._missing = code
        return len(segment.routes) > 1 and self._split(target, segment)

    def _split(self, target: int, segment: Segment) -> bool:
        """Share a segment's requests among its routes; False where one is out of reach of all."""
        records = self._arena.requests[: self._count]
        before = records["target_id"].copy()
        blocks = np.array([route.address for route in segment.routes], np.int64)
        try:
            if slicer.assign(self._arena.address, self._count, target, int(blocks.ctypes.data), len(blocks)):
                return False
            for number, route in enumerate(segment.routes):
                code, slices = self._cut(-2 - number, route)
                if code < 0:
                    self._refuse(code, segment)
                self._share(route, slices, code)
        finally:
            records["target_id"] = before
        return True

    def _cut(self, target: int, route: Route) -> tuple[int, npt.NDArray[np.int64]]:
        room = self._count + SPARE
        while True:
            slices = np.empty(4 * room, np.int64)
            address = int(slices.ctypes.data)
            arguments = self._arena.address, self._count, target, self._local, route.address, address, room
            code = int(slicer.cut(*arguments))
            if code >= 0 or -code % slicer.REASONS != slicer.NO_ROOM:
                return code, slices
            room *= 4

    def _share(self, route: Route, slices: npt.NDArray[np.int64], count: int) -> None:
        """Give each lane of the route a run of the slices."""
        self.held.append(slices)
        address, used = int(slices.ctypes.data), min(len(route.lanes), count)
        for number, lane in enumerate(route.lanes[:used]):
            begin, end = number * count // used, (number + 1) * count // used
            self.parts.append((lane, address + begin * layout.SLICE, end - begin))

    def _refuse(self, code: int, segment: Segment) -> NoReturn:
        index, reason = divmod(-code, slicer.REASONS)
        request = self._arena.requests[index]
        opcode, length = int(request["opcode"]), int(request["length"])
        ours, theirs = int(request["local_addr"]), int(request["remote_addr"])
        where = f"request {index} to segment {segment.name!r}"
        if reason == slicer.BAD_OPCODE:
            raise ConfigError(f"{where}: opcode {opcode} is neither READ (0) nor WRITE (1)")
        if reason == slicer.BAD_LENGTH:
            raise ConfigError(f"{where}: length {length} is above 2**63")
        if reason == slicer.LOCAL_UNREGISTERED:
            need = "registered here" if opcode == WRITE else "registered here and writable"
            raise AddressRejected(f"{where}: our memory {ours:#x}+{length} is not {need}: allocate() or register() it")
        writable = " writable" if opcode == WRITE else ""
        raise AddressRejected(
            f"{where}: {theirs:#x}+{length} is in no{writable} buffer of the {len(segment.buffers)} that it publishes"
            f" for {segment.transport}"
        )
