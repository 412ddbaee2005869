"""The floor of latencies: a line of JSON each.

raw_latency.py read|write --call N --seconds S    two processes that poll: a request of N bytes and its reply in turn
raw_latency.py line --seconds S                   two threads on two cores: a cache line goes there and back
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
from raw import NOSIGNAL, send, warm_memory

from mooncake_hpc.native.atomics import load, now, pause, put, recv, store
from mooncake_hpc.native.compile import kernel

DONTWAIT = 0x40
HEADER, ANSWER = 24, 8  # bytes that the data protocol adds to a payload
LINE = 64
WARM_SECONDS = 0.05


@kernel
def receive_polling(fd, base, size):
    """Receive `size` bytes without sleeping; whether the peer was there."""
    at = 0
    while at < size:
        got = recv(fd, base + at, size - at, DONTWAIT)
        if got == 0:
            return False
        at += max(got, 0)
    return True


@kernel
def ask(fd, base, size, reply, duration):
    """Send `size` bytes and await `reply`, in turn for `duration` ns: turns, or -1 (peer lost), and ns at `base`."""
    begin, turns = now(), 0
    while now() - begin < duration:
        if send(fd, base, size, NOSIGNAL) != size or not receive_polling(fd, base, reply):
            return -1
        turns += 1
    put(base, now() - begin)
    return turns


@kernel
def answer(fd, base, size, reply):
    """The other side, until the connection ends."""
    while receive_polling(fd, base, size):
        send(fd, base, reply, NOSIGNAL)


@kernel
def bounce(mine, other, first, turns):
    """Write turn after turn into `mine` and await it in `other`, or where not `first` in this order reversed; ns."""
    begin = now()
    for turn in range(1, turns + 1):
        if first:
            store(mine, turn)
        while load(other) != turn:
            pause()
        if not first:
            store(mine, turn)
    return now() - begin


def ask_turns(operation: str, block: int, seconds: float) -> tuple[float, float]:
    """Requests of `block` bytes a second, one at a time, and the CPU seconds of both sides."""
    there, back = (HEADER, ANSWER + block) if operation == "read" else (HEADER + block, ANSWER)
    memory = warm_memory(there + back)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        words = ["answer", "--call", str(there), "--reply", str(back), "--port", str(listener.getsockname()[1])]
        peer = subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE)
        try:
            listener.settimeout(60)
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                arguments = connection.fileno(), memory.address, there, back
                ask(*arguments, int(WARM_SECONDS * 1e9))
                cpu = time.process_time()
                done = ask(*arguments, int(seconds * 1e9))
                cpu = time.process_time() - cpu
            output, _ = peer.communicate(timeout=60)
        finally:
            peer.kill()
            peer.wait()
    return done / (int(memory.array[:8].view(np.int64)[0]) / 1e9), cpu + float(output)


def answer_turns(there: int, back: int, port: int) -> None:
    """The other process; prints its CPU seconds."""
    memory = warm_memory(there + back)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        cpu = time.process_time()
        answer(connection.fileno(), memory.address, there, back)
        print(time.process_time() - cpu)


def line(seconds: float) -> tuple[float, float]:
    """Round trips a second of a cache line between the first and the last of our cores, and CPU seconds."""
    turns = int(seconds * 1e6)
    return 1e9 / round_trip(turns), time.process_time()


def round_trip(turns: int) -> float:
    """Nanoseconds that a cache line takes there and back; 0 where there is one core only."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return 0.0
    words = np.zeros(128, np.int64)
    base, spent = int(words.ctypes.data), [0, 0]

    def play(number: int, first: int, second: int) -> None:
        os.sched_setaffinity(0, {cores[-number]})
        bounce(base + first, base + second, number == 0, 100)  # until both are there
        spent[number] = bounce(base + 512 + first, base + 512 + second, number == 0, turns)

    threads = [threading.Thread(target=play, args=each, daemon=True) for each in ((0, 128, 384), (1, 384, 128))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return spent[0] / turns


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("read", "write", "answer", "line"))
    for name in ("call", "reply", "port"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    if options.what == "answer":
        answer_turns(options.call, options.reply, options.port)
        return
    seconds = options.seconds
    rate, cpu = line(seconds) if options.what == "line" else ask_turns(options.what, options.call, seconds)
    moved = LINE if options.what == "line" else options.call
    print(json.dumps({"requests_per_second": rate, "bytes_per_second": rate * moved, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main()
