"""RDMA as the engine sees it: the devices of this process, its regions, its endpoints, a lane a peer."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mooncake_hpc.core.errors import ConfigError, DeviceError, MooncakeError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.core.trouble import Trouble
from mooncake_hpc.native.compile import compile_ahead
from mooncake_hpc.transports.base import Peer, Registration, Transport
from mooncake_hpc.transports.queue import SHARED_KERNELS
from mooncake_hpc.transports.rdma import poll_kernels as native
from mooncake_hpc.transports.rdma.lane import RdmaLane, RdmaRoute
from mooncake_hpc.transports.rdma.nic import Nic
from mooncake_hpc.transports.rdma.pool import Pool
from mooncake_hpc.transports.rdma.regions import KeyTables, Regions, remote_rows
from mooncake_hpc.transports.rdma.topology import Topology, devices
from mooncake_hpc.wire.descriptor import BufferDescriptor, DeviceDescriptor, SegmentDescriptor

log = logging.getLogger(__name__)

CARE_INTERVAL = 1.0  # seconds between two looks at paused paths and broken endpoints


class RdmaTransport(Transport):
    """Opens the devices of the topology. Raises ConfigError without any, DeviceError where none can be used."""

    name = "rdma"

    def __init__(self, topology: Topology, settings: Settings) -> None:
        self._settings, self._topology = settings, topology
        if not topology.devices:
            found = "; ".join(f"{device.name}: {device.problem}" for device in devices()) or "none"
            raise ConfigError(f"no RDMA device that can be used was found, and none is named. There are: {found}")
        compile_ahead(*native.KERNELS, *SHARED_KERNELS)
        self.nics: list[Nic] = []
        self._lanes: weakref.WeakSet[RdmaLane] = weakref.WeakSet()
        self._replaced: list[tuple[object, list[tuple[RdmaLane, int]]]] = []  # tables, and when each lane saw them last
        self._changed: Callable[[], None] = lambda: None
        self._stop = threading.Event()
        self._care = threading.Thread(target=self._run, name="mooncake-rdma", daemon=True)
        try:
            self._open_devices()
            self._regions = Regions(self.nics, topology, settings.rdma, self._keep)
        except BaseException:
            self._close_devices()
            raise
        self.pool = Pool(self.nics, settings.rdma, self._republish)

    def start(self, name: str, changed: Callable[[], None], lookup: Callable[[str], SegmentDescriptor]) -> None:
        self._changed, self.pool.lookup = changed, lookup
        self.pool.server = self._settings.rdma.server_name or name
        for nic in self.nics:
            nic.watch(self._nic_changed)
        self._care.start()

    def export(self, registrations: Sequence[Registration], *, shrinks: bool) -> None:
        self._regions.update(registrations)

    def buffers(self, buffers: tuple[BufferDescriptor, ...]) -> tuple[BufferDescriptor, ...]:
        return self._regions.describe(buffers)

    def describe(self, descriptor: SegmentDescriptor) -> SegmentDescriptor:
        """Devices stay in their order, which the keys refer to; those that are down leave the matrix only."""
        down = {nic.name for nic in self.nics if not nic.active}
        matrix = {
            location: [[name for name in names if name not in down] for names in lists]
            for location, lists in self._topology.as_json().items()
        }
        published = tuple(DeviceDescriptor(nic.name, nic.gid.text, nic.port.lid) for nic in self.nics)
        server = self._settings.rdma.server_name
        return replace(descriptor, devices=published, priority_matrix=matrix, rdma_server_name=server)

    def connect(self, peer: Peer) -> RdmaRoute | None:
        if not peer.descriptor.devices:
            return None
        keys = KeyTables(self._keep)
        keys.fill(remote_rows(peer.descriptor))
        lane = RdmaLane(peer, self.nics, self._topology, self.pool, self._regions, keys, self._settings)
        self._lanes.add(lane)
        return RdmaRoute(lane, keys, self._regions, self._settings)

    def answer(self, request: str) -> dict[str, Any]:
        return self.pool.answer(request)

    def close(self) -> None:
        self._stop.set()
        if self._care.is_alive():
            self._care.join(5.0)
        self.pool.close()
        self._regions.close()
        self._close_devices()

    # --- inside ---------------------------------------------------------------------------------------------

    def _open_devices(self) -> None:
        for index, name in enumerate(self._topology.devices):
            self.nics.append(Nic(name, index, self._settings))
        if not any(nic.active for nic in self.nics):
            names = ", ".join(str(nic) for nic in self.nics)
            raise DeviceError(f"RDMA device {names}: the port is down; is its link or network interface up?")

    def _close_devices(self) -> None:
        while self.nics:
            try:
                self.nics.pop().close()
            except MooncakeError as error:
                log.warning("%s", error)

    def _nic_changed(self, nic: Nic) -> None:
        for lane in list(self._lanes):
            lane.device_changed(nic)
        self._republish()

    def _republish(self) -> None:
        try:
            self._changed()
        except MooncakeError as error:
            log.warning("the segment could not be published again: %s", error)

    def _keep(self, tables: object) -> None:
        """Hold replaced tables until every lane has begun another turn."""
        self._replaced = [
            (old, left)
            for old, lanes in self._replaced
            if (left := [(lane, turn) for lane, turn in lanes if not lane.past(turn)])
        ]
        seen = [(lane, lane.turn) for lane in self._lanes if not lane.past(lane.turn)]
        if seen:
            self._replaced.append((tables, seen))

    def _run(self) -> None:
        trouble = Trouble(log, "looking after RDMA connections")
        while not self._stop.wait(CARE_INTERVAL):
            try:
                self.pool.reclaim()
                for lane in list(self._lanes):
                    lane.look_after()
                trouble.over()
            except Exception as error:
                self._stop.wait(trouble.pause_s(error))
