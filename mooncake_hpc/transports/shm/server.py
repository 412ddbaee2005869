"""Hands our memory files to processes of this host, and waits for them when memory is unregistered."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_hpc.errors import MooncakeError
from mooncake_hpc.kernels import shm as native
from mooncake_hpc.memory import MemoryFile
from mooncake_hpc.transports.base import Registration
from mooncake_hpc.transports.shm import handoff

log = logging.getLogger(__name__)

GRACE = 5.0  # seconds a peer may be busy with memory that is being unregistered before it is given up


class Client:
    """A process that maps our files, and the page that we share with it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.page = MemoryFile(native.PAGE_BYTES, "mooncake-page")
        self.words: npt.NDArray[np.int64] = self.page.array.view(np.int64)
        self.greeted = False

    def close(self) -> None:
        self.connection.close()
        self.page.close()


class ShmServer:
    """One thread answers all clients; exchanges are rare and short."""

    def __init__(self) -> None:
        self.address = f"mooncake-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.bind("\0" + self.address)
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._lock = threading.Lock()
        self._version = 1
        self._registrations: tuple[Registration, ...] = ()
        self._clients: dict[socket.socket, Client] = {}
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="mooncake-shm", daemon=True)
        self._thread.start()

    def export(self, registrations: Sequence[Registration], *, shrinks: bool) -> None:
        """As `Transport.export`."""
        with self._lock:
            self._registrations = tuple(r for r in registrations if r.remote_accessible and r.file is not None)
            self._version += 1
            version = self._version
            for client in self._clients.values():
                client.words[native.PAGE_VERSION // 8] = version
        if shrinks:
            self._quiesce(version)

    def close(self) -> None:
        """End the thread and all connections. Idempotent."""
        with contextlib.suppress(OSError):
            self._waker.close()
        self._thread.join(5.0)

    def _quiesce(self, version: int) -> None:
        deadline = time.monotonic() + GRACE
        while True:
            with self._lock:
                busy = [c for c in self._clients.values() if 0 < c.words[native.PAGE_BUSY // 8] < version]
            if not busy:
                return
            if time.monotonic() > deadline:  # stopped in the middle of a copy; what it may still touch is a memfd
                log.warning("%d processes still use unregistered shared memory after %g s", len(busy), GRACE)
                return
            time.sleep(0.0005)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            running = True
            while running:
                for key, _ in selector.select():
                    if key.fileobj is self._wake:
                        running = False
                    elif key.fileobj is self._listener:
                        self._accept(selector)
                    else:
                        self._answer(selector, self._clients[key.fileobj])  # type: ignore[index]
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._listener.close()
        self._wake.close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            log.warning("shared memory: accept: %s", error)
            time.sleep(0.05)
            return
        connection.settimeout(handoff.TIMEOUT)
        if not handoff.peer_is_ours(connection):
            log.warning("shared memory: a process of another user was refused")
            connection.close()
            return
        try:
            client = Client(connection)
        except MooncakeError as error:
            log.warning("shared memory: no page for a client: %s", error)
            connection.close()
            return
        with self._lock:
            client.words[native.PAGE_VERSION // 8] = self._version
            self._clients[connection] = client
        selector.register(connection, selectors.EVENT_READ)

    def _answer(self, selector: selectors.BaseSelector, client: Client) -> None:
        try:
            request = handoff.receive(client.connection)
            if request is not None:
                reply, fds = self._describe(client, {int(serial) for serial in request["have"]})
                try:
                    handoff.send(client.connection, reply, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
                return
        except (OSError, ValueError, KeyError, TypeError, MooncakeError) as error:
            log.debug("shared memory: client dropped: %s", error)
        selector.unregister(client.connection)
        with self._lock:
            del self._clients[client.connection]
        client.close()

    def _describe(self, client: Client, have: set[int]) -> tuple[dict[str, Any], list[int]]:
        """All our buffers and the files they lie in; descriptors of the page (first) and of files not in `have`."""
        with self._lock:
            usable = [r for r in self._registrations if r.file is not None and not r.file.closed]
            files = {r.file.serial: r.file for r in usable if r.file is not None}
            new = [serial for serial in files if serial not in have]
            first = not client.greeted
            client.greeted = True
            # duplicates: a file may be closed while its descriptor is on the way
            fds = [os.dup(fd) for fd in [client.page.fd] * first + [files[serial].fd for serial in new]]
            reply = {
                "version": self._version,
                "page": first,
                "files": [[serial, file.address, file.nbytes] for serial, file in files.items()],
                "new": new,
                "buffers": [[r.address, r.length, r.readonly] for r in usable],
            }
            return reply, fds
