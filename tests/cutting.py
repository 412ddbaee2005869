"""Ways to break a TCP connection that runs: from outside its two processes, and by a proxy that keeps bytes back.

`python cutting.py HOST PORT DELAY` is the proxy: it prints its own port, forwards connections to HOST:PORT, and at each
line on its standard input breaks them all: the clients see a reset at once, while what they sent before still
reaches the server, up to DELAY seconds later. That is what a network may do to bytes that are on the way.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

PIDFD_GETFD = 438  # pidfd_getfd(2)
ESTABLISHED = "01"
libc = ctypes.CDLL(None, use_errno=True)


def connections(pid: int, port: int) -> list[int]:
    """Descriptors of a process's established TCP connections whose own port, or the peer's, is `port`."""
    inodes = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        ports = [int(words[column].rpartition(":")[2], 16) for column in (1, 2)]
        if port in ports and words[3] == ESTABLISHED:
            inodes.add(f"socket:[{words[9]}]")
    found = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{entry}") in inodes:
                found.append(int(entry))
    return found


def take(pid: int, fd: int) -> socket.socket:
    """The same socket as descriptor `fd` of the process. Raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        copy = libc.syscall(PIDFD_GETFD, pidfd, fd, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return socket.socket(fileno=copy)
    finally:
        os.close(pidfd)


def reset(connection: socket.socket) -> None:
    """Abort it, unsent bytes and all: connecting to no address does that (connect(2))."""
    unspecified = (ctypes.c_char * 16)()
    libc.connect(connection.fileno(), unspecified, 16)


class Outsider:
    """Aborts a process's connections of `port`."""

    def __init__(self, pid: int, port: int) -> None:
        self._pid, self._port = pid, port
        self._taken: list[socket.socket] = []

    def prepare(self) -> None:
        """Take hold of the connections that there are."""
        for fd in connections(self._pid, self._port):
            with contextlib.suppress(OSError):
                self._taken.append(take(self._pid, fd))

    def cut(self) -> int:
        """Abort them; how many they were."""
        count = len(self._taken)
        for connection in self._taken:
            reset(connection)
            connection.close()
        self._taken.clear()
        return count


class LateProxy:
    """The proxy process. A context manager; connect to 127.0.0.1:`port`."""

    def __init__(self, host: str, port: int, delay: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, host, str(port), str(delay)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def prepare(self) -> None:
        """Nothing: it has hold of them."""

    def cut(self) -> int:
        """Break every connection; how many there were."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> LateProxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate(timeout=10)


class _Pair:
    """A client and the server that it is forwarded to."""

    def __init__(self, client: socket.socket, target: tuple[str, int]) -> None:
        self.client = client
        self.server = socket.create_connection(target)

    def pump(self, source: socket.socket) -> bool:
        """Forward what is there; False at the end."""
        target = self.server if source is self.client else self.client
        try:
            data = source.recv(1 << 18)
            target.sendall(data)
        except OSError:
            return False
        return bool(data)

    def cut(self, delay: float) -> None:
        """Reset the client; what it had sent arrives late."""
        late = b""
        self.client.setblocking(False)
        with contextlib.suppress(OSError):
            while data := self.client.recv(1 << 20):
                late += data
        reset(self.client)
        self.client.close()
        threading.Timer(random.uniform(0, delay), self._deliver, [late]).start()

    def _deliver(self, late: bytes) -> None:
        with contextlib.suppress(OSError):
            self.server.sendall(late)
            self.server.shutdown(socket.SHUT_WR)
            while self.server.recv(1 << 18):
                pass
        self.server.close()


def _events(selector: selectors.BaseSelector) -> Iterator[object]:
    while True:
        for key, _ in selector.select():
            yield key.fileobj


def main() -> None:
    target, delay = (sys.argv[1], int(sys.argv[2])), float(sys.argv[3])
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    pairs: dict[socket.socket, _Pair] = {}
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)

    def drop(pair: _Pair) -> None:
        for end in (pair.client, pair.server):
            selector.unregister(end)
            del pairs[end]

    for ready in _events(selector):
        if ready is listener:
            pair = _Pair(listener.accept()[0], target)
            for end in (pair.client, pair.server):
                pairs[end] = pair
                selector.register(end, selectors.EVENT_READ)
        elif isinstance(ready, socket.socket):
            if ready in pairs and not pairs[ready].pump(ready):
                pair = pairs[ready]
                drop(pair)
                pair.client.close()
                pair.server.close()
        elif os.read(0, 1):
            broken = set(pairs.values())
            for pair in broken:
                drop(pair)
                pair.cut(delay)
            print(len(broken), flush=True)
        else:
            return


if __name__ == "__main__":
    main()
