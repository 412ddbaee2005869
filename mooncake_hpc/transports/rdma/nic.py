"""An RDMA device of this process: opened once, with its port, its GID, and the events that tell when it goes away."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable

from mooncake_hpc import topology
from mooncake_hpc.errors import DeviceError
from mooncake_hpc.settings import Settings
from mooncake_hpc.transports.rdma import gid, verbs
from mooncake_hpc.transports.rdma.verbs import Device, Port

log = logging.getLogger(__name__)


class Nic:
    """`index` is its place in what the segment publishes. `active` follows the port's state."""

    def __init__(self, name: str, index: int, settings: Settings) -> None:
        """Raises DeviceError for one that cannot be opened, ConfigError for one without a port or a GID."""
        self.name, self.index = name, index
        self._number = settings.rdma.port
        _check_rights(name)
        self._gids = gid.candidates(name, self._number, settings)[: 1 + settings.rdma.gid_retries]
        self.gid = self._gids[0]
        self.device = Device(name, self._number)
        self.port: Port = self.device.port()
        self.active = self.port.active
        self._wake, self._stop = os.pipe()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"{self.name} port {self._number}"

    def watch(self, changed: Callable[[Nic], None]) -> None:
        """Call `changed` from a thread whenever the port comes or goes, or its GIDs change."""
        self._thread = threading.Thread(target=self._run, args=(changed,), name=f"mooncake-{self.name}", daemon=True)
        self._thread.start()

    def next_gid(self, tried: gid.Gid) -> bool:
        """Go on to the next candidate if `tried` is still the present one; whether there is another than `tried`."""
        with self._lock:
            if self.gid != tried:
                return True
            left = self._gids[self._gids.index(tried) + 1 :] if tried in self._gids else []
            if not left:
                return False
            log.warning("RDMA device %s: GID %s does not connect, trying %s", self, tried, left[0])
            self.gid = left[0]
            return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._stop)
        if self._thread is not None:
            self._thread.join(5.0)
        os.close(self._wake)
        self.device.close()

    def _run(self, changed: Callable[[Nic], None]) -> None:
        for event in self.device.events(self._wake):
            if event not in (*verbs.PORT_GONE, verbs.PORT_BACK, verbs.GID_CHANGED):
                continue
            try:
                self.port = self.device.port()
                self.active = self.port.active and event not in verbs.PORT_GONE
            except DeviceError as error:
                log.warning("%s", error)
                self.active = False
            log.info("RDMA device %s is %s", self, "active" if self.active else "down")
            try:
                changed(self)
            except Exception:
                log.exception("RDMA device %s", self)


def _check_rights(name: str) -> None:
    for device in topology.devices():
        if device.name == name and device.problem and device.active_ports:
            raise DeviceError(f"RDMA device {name}: {device.problem}")
