"""Hands our memory files to processes of this host, and waits for them when memory is unregistered."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_hpc.core.authentication import Authentication
from mooncake_hpc.core.errors import MooncakeError
from mooncake_hpc.core.memory import MemoryFile
from mooncake_hpc.core.process import own, own_listener
from mooncake_hpc.core.trouble import Trouble
from mooncake_hpc.transports.base import Registration
from mooncake_hpc.transports.shm import handoff
from mooncake_hpc.transports.shm import kernels as native

log = logging.getLogger(__name__)

MAX_CLIENTS = 256
GRACE = 5.0  # seconds a peer may be busy with memory that is being unregistered before it is given up


class Client:
    """A process that maps our files, and the page that we share with it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.page = MemoryFile(native.PAGE_BYTES, "mooncake-page")
        self.words: npt.NDArray[np.int64] = self.page.array.view(np.int64)
        self.greeted = False
        self.thread: threading.Thread | None = None

    def stop(self) -> None:
        """Have its thread end, which closes."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.connection.close()
        self.page.close()


class ShmServer:
    """Exchanges are rare and short; a thread a client, so that one which stops half-way holds up nobody."""

    def __init__(self, authentication: Authentication) -> None:
        self._authentication = authentication
        self.address = f"mooncake-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener = own_listener(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
        self._listener.bind("\0" + self.address)
        self._listener.listen(socket.SOMAXCONN)
        self._lock = threading.Lock()
        self._version = 1
        self._registrations: tuple[Registration, ...] = ()
        self._clients: dict[Client, None] = {}  # oldest first
        self._closing = False
        self._thread = threading.Thread(target=self._accept, name="mooncake-shm-accept", daemon=True)
        self._thread.start()

    def export(self, registrations: Sequence[Registration], *, shrinks: bool) -> None:
        """As `Transport.export`."""
        with self._lock:
            self._registrations = tuple(r for r in registrations if r.remote_accessible and r.file is not None)
            self._version += 1
            version = self._version
            for client in self._clients:
                client.words[native.PAGE_VERSION // 8] = version
        if shrinks:
            self._quiesce(version)

    def close(self) -> None:
        """End all connections and threads. Idempotent."""
        deadline = time.monotonic() + 5.0
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5.0)
        self._listener.close()
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            client.stop()
        for client in clients:
            if client.thread is not None and client.thread.ident is not None:
                client.thread.join(max(0.0, deadline - time.monotonic()))

    def _quiesce(self, version: int) -> None:
        deadline = time.monotonic() + GRACE
        while True:
            with self._lock:
                busy = [c for c in self._clients if 0 < c.words[native.PAGE_BUSY // 8] < version]
            if not busy:
                return
            if time.monotonic() > deadline:  # stopped in the middle of a copy; what it may still touch is a memfd
                log.warning("%d processes still use unregistered shared memory after %g s", len(busy), GRACE)
                return
            time.sleep(0.0005)

    def _accept(self) -> None:
        trouble = Trouble(log, "shared memory: a client could not be taken", 0.5)
        while not self._closing:
            connection = None
            try:
                connection, _ = self._listener.accept()
                self._admit(own(connection))
                trouble.over()
            except Exception as error:  # the next client is to be served all the same
                if self._closing:
                    return
                if connection is not None:
                    connection.close()
                time.sleep(trouble.pause_s(error))

    def _admit(self, connection: socket.socket) -> None:
        if not handoff.peer_is_ours(connection):
            log.warning("shared memory: a process of another user was refused")
            connection.close()
            return
        client = Client(connection)
        client.thread = threading.Thread(target=self._serve, args=(client,), name="mooncake-shm", daemon=True)
        with self._lock:
            full = len(self._clients) >= MAX_CLIENTS and not self._make_room()
            if not full:
                client.words[native.PAGE_VERSION // 8] = self._version
                self._clients[client] = None
        if full:
            log.warning("shared memory: %d clients, one more refused", MAX_CLIENTS)
            client.close()
            return
        try:
            client.thread.start()
        except RuntimeError:  # the system's limit of threads
            self._forget(client)
            raise

    def _make_room(self) -> bool:
        """End the oldest client that has never asked for anything. The caller holds the lock."""
        silent = next((c for c in self._clients if not c.greeted), None)
        if silent is None:
            return False
        silent.greeted = True  # not chosen again
        silent.stop()  # and forgotten by its thread
        return True

    def _serve(self, client: Client) -> None:
        try:
            if self._admits(client):
                while self._answer(client):
                    pass
        except (OSError, MooncakeError) as error:
            log.debug("shared memory: client dropped: %s", error)
        except Exception:
            log.exception("shared memory: client dropped")
        finally:
            self._forget(client)

    def _forget(self, client: Client) -> None:
        with self._lock:
            self._clients.pop(client, None)
        client.close()

    def _admits(self, client: Client) -> bool:
        """Whether its process may have our memory."""
        if not self._authentication.required:
            return True
        client.connection.settimeout(handoff.TIMEOUT)
        if handoff.admit(client.connection, self._authentication):
            return True
        log.warning("shared memory: a process without our secret was refused")
        return False

    def _answer(self, client: Client) -> bool:
        """Wait for the next request and answer it; False at the end."""
        client.connection.settimeout(None)
        client.connection.recv(1, socket.MSG_PEEK)
        client.connection.settimeout(handoff.TIMEOUT)
        request = handoff.receive(client.connection, handoff.read_request)
        if request is None:
            return False
        if request.hello is not None:  # it has a secret, and we have none
            handoff.refuse(client.connection)
            return False
        reply, fds = self._describe(client, set(request.have or ()))
        try:
            handoff.send(client.connection, reply, fds)
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _describe(self, client: Client, have: set[int]) -> tuple[dict[str, Any], list[int]]:
        """All our buffers and the files they lie in; descriptors of the page (first) and of files not in `have`."""
        with self._lock:
            usable = [r for r in self._registrations if r.file is not None and not r.file.closed]
            files = {r.file.serial: r.file for r in usable if r.file is not None}
            new = [serial for serial in files if serial not in have]
            first = not client.greeted
            client.greeted = True
            # duplicates: a file may be closed while its descriptor is on the way
            fds = _duplicates([client.page.fd] * first + [files[serial].fd for serial in new])
            reply = {
                "version": self._version,
                "page": first,
                "files": [[serial, file.address, file.nbytes] for serial, file in files.items()],
                "new": new,
                "buffers": [[r.address, r.length, r.readonly_for_peers] for r in usable],
            }
            return reply, fds


def _duplicates(fds: Sequence[int]) -> list[int]:
    """A new descriptor for each; none where they cannot all be had. Raises OSError."""
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError:
        for fd in made:
            os.close(fd)
        raise
    return made
