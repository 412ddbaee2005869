#!/usr/bin/env bash
# Mooncake 0.3.13.post1 (mooncake-transfer-engine-non-cuda), tcp with P2PHANDSHAKE: `get_first_buffer_address` of a segment
# that was asked for before its owner registered memory returns 0 for ever, though transfers to that memory work.
#
# The descriptor is cached at the first question. A transfer reads it again where an address is unknown, this call never
# does, not even after such a transfer. So a program that waits for a peer's buffer by calling it in a loop waits for ever,
# and after the peer has registered other memory the call names memory that is gone.
# Needs the system libraries that Mooncake's wheel names: libibverbs1, libnuma1, libcurl4.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q mooncake-transfer-engine-non-cuda==0.3.13.post1 numpy==2.4.6
MC_TCP_BIND_ADDRESS=127.0.0.1 timeout 60 "$work/venv/bin/python" - 2>"$work/log" <<'PROGRAM'
import numpy as np
from mooncake.engine import TransferEngine


def engine(name: str) -> TransferEngine:
    made = TransferEngine()
    assert made.initialize(name, "P2PHANDSHAKE", "tcp", "") == 0
    return made


owner, early, late = (engine(f"127.0.0.1:{port}") for port in (12345, 12346, 12347))
segment = f"127.0.0.1:{owner.get_rpc_port()}"
before = early.get_first_buffer_address(segment)
data, copy = np.arange(4096, dtype=np.uint8), np.zeros(4096, np.uint8)
assert owner.register_memory(data.ctypes.data, data.nbytes) == 0
assert early.register_memory(copy.ctypes.data, copy.nbytes) == 0
code = early.transfer_sync_read(segment, copy.ctypes.data, data.ctypes.data, data.nbytes)
after = early.get_first_buffer_address(segment)
newcomer = late.get_first_buffer_address(segment)
print(f"asked before the owner registers: {before}")
print(f"a read of that memory: {code}, right bytes: {bool((copy == data).all())}")
print(f"asked again after that read: {after}")
print(f"asked by a process that had not asked before: {'the address' if newcomer == data.ctypes.data else newcomer}")
assert (before, code, after) == (0, 0, 0) and (copy == data).all() and newcomer == data.ctypes.data, "this has changed"
PROGRAM
