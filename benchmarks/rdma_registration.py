"""How long memory takes until all devices may touch it.

`rdma_registration.py WAY BYTES SECONDS DEVICES` registers memory that nobody has touched yet, anew for SECONDS, on so
many devices, and prints a line of JSON. The WAYs: `ours`, an engine's `register`; `in turn`, libibverbs on one device
after the other, which faults the pages in by one core.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mooncake_hpc import TransferEngine
from mooncake_hpc.transports.rdma.verbs import Device

Register = Callable[[np.ndarray], Callable[[], None]]  # gives what undoes it


@contextlib.contextmanager
def ours(devices: Sequence[str]) -> Iterator[Register]:
    with TransferEngine(
        "registration:1", "P2PHANDSHAKE", protocol="rdma", bind_address="127.0.0.1", device_name=",".join(devices)
    ) as engine:

        def register(memory: np.ndarray) -> Callable[[], None]:
            engine.register(memory)
            return lambda: engine.unregister(memory)

        yield register


@contextlib.contextmanager
def in_turn(devices: Sequence[str]) -> Iterator[Register]:
    opened = [Device(name, 1) for name in devices]

    def register(memory: np.ndarray) -> Callable[[], None]:
        address = int(memory.ctypes.data)
        regions = [device.register(address, memory.size, True, True, True, False) for device in opened]

        def undo() -> None:
            for region in regions:
                region.close()

        return undo

    try:
        yield register
    finally:
        for device in opened:
            device.close()


WAYS = {"ours": ours, "in turn": in_turn}


def measure(way: str, size: int, seconds: float, devices: Sequence[str]) -> dict[str, float]:
    done, elapsed, used = 0, 0.0, 0.0
    with WAYS[way](devices) as register:
        while elapsed < seconds:
            with mmap.mmap(-1, size) as untouched:
                memory = np.frombuffer(untouched, np.uint8)
                began, cpu = time.perf_counter(), time.process_time()
                undo = register(memory)
                elapsed, used = elapsed + time.perf_counter() - began, used + time.process_time() - cpu
                undo()
                done += 1
                del memory, undo
    return {
        "requests_per_second": done * len(devices) / elapsed,
        "bytes_per_second": done * size * len(devices) / elapsed,
        "cpu_seconds_per_gb": used / (done * size * len(devices) / 1e9),
    }


def main(arguments: Sequence[str]) -> int:
    way, size, seconds, devices = arguments
    print(json.dumps(measure(way, int(size), float(seconds), [f"rxe{number}" for number in range(int(devices))])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
