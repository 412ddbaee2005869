"""An RDMA device of this process: opened once, with its port, its GID, and the events that tell when it goes away."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable

from mooncake_hpc.core.errors import ConfigError, DeviceError
from mooncake_hpc.core.settings import Settings
from mooncake_hpc.transports.rdma import gid, topology, verbs
from mooncake_hpc.transports.rdma.verbs import Device, Port

log = logging.getLogger(__name__)


class Nic:
    """`index` is its place in what the segment publishes. `active` follows the port's state."""

    def __init__(self, name: str, index: int, settings: Settings) -> None:
        """Raises DeviceError for one that cannot be opened, ConfigError for one without a port or a GID."""
        self.name, self.index = name, index
        self._settings, self._number = settings, settings.rdma.port
        _check_rights(name)
        self.device = Device(name, self._number)
        try:
            self._gids = self._candidates()
            self.gid, self._proved = self._gids[0], False
            self.port: Port = self.device.port()
        except BaseException:
            self.device.close()
            raise
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

    def gids(self) -> list[gid.Gid]:
        """Those to connect with, in the order in which they are tried."""
        with self._lock:
            return [self.gid, *(other for other in self._gids if other != self.gid)]

    def connected_with(self, used: gid.Gid) -> bool:
        """Take note of what connects, so that it is tried first if nothing did so far. Whether that is another one
        than before, which has to be published."""
        with self._lock:
            changes = used != self.gid and not self._proved and used in self._gids
            self._proved = self._proved or changes or used == self.gid
            if changes:
                log.warning("RDMA device %s: GID %s does not connect, %s does", self, self.gid, used)
                self.gid = used
            return changes

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._stop)
        if self._thread is not None:
            self._thread.join(5.0)
        os.close(self._wake)
        self.device.close()

    def _candidates(self) -> list[gid.Gid]:
        found = gid.candidates(self.name, self._number, self._settings, table=self.device.gids())
        return found[: 1 + self._settings.rdma.gid_retries]

    def _look_at_gids(self) -> None:
        """The interface's addresses may have changed, and the one in use with them."""
        with self._lock, contextlib.suppress(ConfigError):  # none: they may come back
            self._gids = self._candidates()
            if self.gid not in self._gids:
                self.gid, self._proved = self._gids[0], False
                log.info("RDMA device %s has another GID: %s", self, self.gid)

    def _run(self, changed: Callable[[Nic], None]) -> None:
        for event in self.device.events(self._wake):
            if event not in (*verbs.PORT_GONE, verbs.PORT_BACK, verbs.GID_CHANGED):
                continue
            try:
                if event not in verbs.PORT_GONE:
                    self._look_at_gids()
                self.port = self.device.port()
                self.active = self.port.active and event not in verbs.PORT_GONE
            except DeviceError as error:
                log.warning("%s", error)
                self.active = False
            except Exception:
                log.exception("RDMA device %s", self)
                self.active = False
            log.info("RDMA device %s is %s", self, "active" if self.active else "down")
            try:
                changed(self)
            except Exception:
                log.exception("RDMA device %s", self)


def _check_rights(name: str) -> None:
    device = topology.device(name)
    if device.problem and device.active_ports:
        raise DeviceError(f"RDMA device {name}: {device.problem}")
