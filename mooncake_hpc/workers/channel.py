"""Messages from the pool to a worker: a SOCK_SEQPACKET socket, one fixed record a message.

ATTACH  map the memory file whose descriptor comes along     FORGET  unmap it     STOP  end
"""

from __future__ import annotations

import os
import socket
import struct
from array import array
from dataclasses import dataclass

ATTACH, FORGET, STOP = 1, 2, 3
RECORD = struct.Struct("<qqq")  # kind, serial number of the file, its address in the sender


@dataclass(frozen=True, slots=True)
class Message:
    """`fd` belongs to the receiver; -1 where none came."""

    kind: int
    serial: int = 0
    address: int = 0
    fd: int = -1


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends, neither of which blocks."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    return ends[0], ends[1]


def send(end: socket.socket, message: Message) -> None:
    """Raises BlockingIOError when the receiver has left too many unread, OSError when it is gone."""
    record = RECORD.pack(message.kind, message.serial, message.address)
    fds = array("i", [message.fd] if message.fd >= 0 else [])
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
    end.sendmsg([record], rights, socket.MSG_NOSIGNAL)


def receive(end: socket.socket) -> Message | None:
    """The next message; None when there is none yet. A sender that is gone reads as STOP."""
    try:
        record, rights, _, _ = end.recvmsg(RECORD.size, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return Message(STOP)
    fds = array("i")
    for _, _, data in rights:
        fds.frombytes(data)
    if len(record) != RECORD.size:
        for fd in fds:
            os.close(fd)
        return Message(STOP)
    kind, serial, address = RECORD.unpack(record)
    return Message(kind, serial, address, fds[0] if fds else -1)
