"""A rank of `startup.py`: `startup_rank.py ENDPOINT SECONDS`. Rank 0 prints a JSON object of all ranks' figures."""

import os
import sys
import time

OPENED: set[object] = set()
sys.addaudithook(lambda name, words: OPENED.add(words[0]) if name == "open" else None)


def age() -> float:
    """Seconds since this process was started."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def main(endpoint: str, seconds: float) -> None:
    import json

    import numpy as np
    from numba.core import event

    from mooncake_hpc import TransferEngine
    from mooncake_hpc.jobs.mpi import World, default_name, detect

    launch = detect()
    assert launch is not None, "start me by mpirun"
    world = World(launch)
    with (
        event.install_recorder("numba:compile") as compiled,
        TransferEngine(default_name(launch), endpoint, protocol="tcp", bind_address="127.0.0.1") as engine,
    ):
        engine.allocate(1 << 20)
        names = world.allgather(engine.name, 120, "all publish")
        mine = np.zeros(1 << 16, np.uint8)
        engine.register(mine, remote_accessible=False)
        segment = engine.open_segment(names[(world.rank + 1) % world.size])
        engine.read(mine, segment, segment.buffers[0].address)
        figures = {"seconds": age(), "files": len(OPENED), "libraries": libraries(), "compiled": 0.0}

        world.barrier(120, "all have transferred")
        started = count(endpoint) if world.rank == 0 else {}
        world.barrier(120, "requests are counted")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            engine.read(mine, segment, segment.buffers[0].address)
            time.sleep(0.01)
        steady = count(endpoint) if world.rank == 0 else {}
        figures["compiled"] = len(compiled.buffer) / 2  # an event has a start and an end
        ranks = world.gather(figures, 120, "figures")
        world.barrier(120, "the end")
    if world.rank == 0:
        print(json.dumps({"ranks": ranks, "started": started, "steady": steady}))


def libraries() -> int:
    """Shared libraries that are mapped."""
    with open("/proc/self/maps") as maps:
        return len({line.split()[-1] for line in maps if ".so" in line})


def count(endpoint: str) -> dict[str, int]:
    from startup import messages

    return messages(endpoint)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
