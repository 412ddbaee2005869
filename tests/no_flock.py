"""Runs a command for which flock(2) is not there, as on some parallel file systems: `no_flock.py COMMAND ARGUMENT…`

A seccomp filter answers ENOSYS, for this process and all that it starts. Exit code 77: the kernel has no such filters.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 38, 22, 2  # prctl(2)
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
ALLOW, ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h
FLOCK = {"x86_64": 73, "aarch64": 32}


def refuse_flock() -> bool:
    number = FLOCK.get(os.uname().machine)
    if number is None:
        return False
    steps = [
        (LOAD, 0, 0, 0),
        (JUMP_IF_EQUAL, 0, 1, number),
        (RETURN, 0, 0, ERRNO | errno.ENOSYS),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return libc.prctl(PR_SET_SECCOMP, MODE_FILTER, program, 0, 0) == 0


if __name__ == "__main__":
    if not refuse_flock():
        sys.exit(77)
    os.execvp(sys.argv[1], sys.argv[1:])
