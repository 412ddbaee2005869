"""The floor: a bare numba `send`/`recv` loop over one connection, and memcpy, over blocks such as the bench's.

raw.py stream --footprint N --call N --seconds S    two processes, one direction; a line of JSON
raw.py hashed --footprint N --call N --seconds S    as stream, with a digest of each call's bytes
raw.py memcpy --footprint N --call N --seconds S    np.copyto between two warm memory files
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
from numba import types

from mooncake_hpc.core.memory import MemoryFile
from mooncake_hpc.native.atomics import get, now, put, recv
from mooncake_hpc.native.compile import kernel

send = types.ExternalFunction("send", types.int64(types.int32, types.int64, types.int64, types.int32))
WAITALL, NOSIGNAL = 0x100, 0x4000
WARM_ROUNDS = 3


@kernel
def send_rounds(fd, base, footprint, call, until, rounds):
    """Send the blocks again and again until `until` (ns) or `rounds` (0: no limit); whether the peer was there."""
    done = 0
    while now() < until and (rounds == 0 or done < rounds):
        at = 0
        while at < footprint:
            sent = send(fd, base + at, min(call - at % call, footprint - at), NOSIGNAL)
            if sent <= 0:
                return False
            at += sent
        done += 1
    return True


@kernel
def receive_rounds(fd, base, footprint, call, rounds, result):
    """Receive whole blocks, `rounds` times or (0) to the end; bytes and ns since the first are left at `result`."""
    total = done = begin = 0
    got = 1
    while got > 0 and (rounds == 0 or done < rounds):
        at = 0
        while at < footprint and got > 0:
            got = recv(fd, base + at, min(call, footprint - at), WAITALL)
            begin = now() if begin == 0 else begin
            at += max(got, 0)
        total += at
        done += 1
    put(result, total)
    put(result + 8, now() - begin)
    return get(result)


def receive_hashed(connection: socket.socket, memory: MemoryFile, call: int) -> tuple[int, int]:
    """As `receive_rounds` to the end, with a digest of each call's bytes."""
    from xxhash import xxh3_128

    total = begin = 0
    while True:
        for at in range(0, memory.nbytes, call):
            piece = memory.array[at : at + call]
            got = connection.recv_into(piece, piece.nbytes, socket.MSG_WAITALL)
            begin = begin or time.monotonic_ns()
            if not got:
                return total, time.monotonic_ns() - begin
            xxh3_128(piece[:got]).digest()
            total += got


def stream(footprint: int, call: int, seconds: float, hashed: bool = False) -> tuple[float, float]:
    """Bytes a second into this process, and the CPU seconds of both sides."""
    memory = warm_memory(footprint)
    result = np.zeros(2, np.int64)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sizes = ["--footprint", str(footprint), "--call", str(call), "--seconds", str(seconds)]
        port = str(listener.getsockname()[1])
        sender = subprocess.Popen([sys.executable, __file__, "send", *sizes, "--port", port], stdout=subprocess.PIPE)
        try:
            listener.settimeout(60)
            connection, _ = listener.accept()
            with connection:
                connection.setblocking(True)
                place = int(result.ctypes.data)
                receive_rounds(connection.fileno(), memory.address, footprint, call, WARM_ROUNDS, place)
                cpu = time.process_time()
                if hashed:
                    result[:] = receive_hashed(connection, memory, call)
                else:
                    receive_rounds(connection.fileno(), memory.address, footprint, call, 0, place)
                cpu = time.process_time() - cpu
            output, _ = sender.communicate(timeout=60)
        finally:
            sender.kill()
            sender.wait()
    return result[0] / (result[1] / 1e9), cpu + float(output)


def send_stream(footprint: int, call: int, seconds: float, port: int) -> None:
    """The other process: warm-up rounds, then for `seconds`; prints its CPU seconds."""
    memory = warm_memory(footprint)
    forever = time.monotonic_ns() + 3600 * 10**9
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send_rounds(connection.fileno(), memory.address, footprint, call, forever, WARM_ROUNDS)
        cpu = time.process_time()
        until = time.monotonic_ns() + int(seconds * 1e9)
        send_rounds(connection.fileno(), memory.address, footprint, call, until, 0)
        print(time.process_time() - cpu)


def memcpy(footprint: int, call: int, seconds: float) -> tuple[float, float]:
    """Bytes a second of np.copyto, a call a block, and CPU seconds."""
    source, destination = warm_memory(footprint), warm_memory(footprint)
    pairs = [(destination.array[at : at + call], source.array[at : at + call]) for at in range(0, footprint, call)]
    for _ in range(WARM_ROUNDS):
        for to, come in pairs:
            np.copyto(to, come)
    cpu, begin, total = time.process_time(), time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        for to, come in pairs:
            np.copyto(to, come)
        total += footprint
    return total / elapsed, time.process_time() - cpu


def warm_memory(footprint: int) -> MemoryFile:
    """The kind of memory that the bench has, faulted in."""
    memory = MemoryFile(footprint)
    memory.array[:: os.sysconf("SC_PAGE_SIZE")] = 1
    return memory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("stream", "hashed", "send", "memcpy"))
    for name in ("footprint", "call", "port"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    if options.what == "send":
        send_stream(options.footprint, options.call, options.seconds, options.port)
        return
    sizes = options.footprint, options.call, options.seconds
    rate, cpu = memcpy(*sizes) if options.what == "memcpy" else stream(*sizes, options.what == "hashed")
    print(json.dumps({"bytes_per_second": rate, "cpu_seconds_per_gb": cpu / (rate * options.seconds / 1e9)}))


if __name__ == "__main__":
    main()
