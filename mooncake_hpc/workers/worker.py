"""A worker's main loop: run pieces from the ring, map memory files on demand, end when the pool's process does.

The parent's death is read from its pidfd and from the channel's end. PR_SET_PDEATHSIG would not do: it fires when
the *thread* that started the worker ends.
"""

from __future__ import annotations

import os
import select
import socket

import numpy as np

from mooncake_hpc.core.errors import RegistrationError
from mooncake_hpc.core.memory import MemoryFile
from mooncake_hpc.workers import channel
from mooncake_hpc.workers import ring_kernels as ring

SPINS = 2000  # pauses before a sleep, about 50 µs
IDLE = BUSY = 100_000_000  # ns in the kernel before a look at the channel and the parent
MISSING_FILE_POLL = 10  # ms between two tries at jobs whose files have not come


def serve(owner: int, control_fd: int, channel_fd: int, parent: int) -> None:
    """Work as number `owner` until told to stop, or until process `parent` is gone."""
    with socket.socket(fileno=channel_fd) as end, MemoryFile.attach(control_fd) as control:
        try:
            pidfd = os.pidfd_open(parent)
        except ProcessLookupError:
            return
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.register(end, select.POLLIN)
        files = _Files()
        while True:
            outcome = ring.serve(control.address, owner, files.table, SPINS, IDLE, BUSY)
            ready = {fd for fd, _ in poller.poll(MISSING_FILE_POLL if outcome == ring.FILE_MISSING else 0)}
            if pidfd in ready or (ready and not files.read_messages(end)):
                return


class _Files:
    """The pool's memory files that this process has mapped, and the table of them for the ring."""

    def __init__(self) -> None:
        self._mapped: dict[int, tuple[MemoryFile, int]] = {}
        self._rebuild()

    def read_messages(self, end: socket.socket) -> bool:
        """Do what the channel says; False when it says to stop."""
        while (message := channel.receive(end)) is not None:
            if message.kind == channel.STOP:
                return False
            if message.kind == channel.ATTACH:
                self._attach(message)
            else:
                self._mapped.pop(message.serial, None)
            self._rebuild()
        return True

    def _attach(self, message: channel.Message) -> None:
        try:
            file = MemoryFile.attach(message.fd)
        except RegistrationError:
            return  # no address space left, say: the pool's own process does the pieces of this file
        self._mapped[message.serial] = file, file.address - message.address

    def _rebuild(self) -> None:
        rows = [(serial, delta) for serial, (_, delta) in self._mapped.items()]
        self.table = np.array(rows, np.int64).reshape(-1, 2)
