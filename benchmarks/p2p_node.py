"""One process of the fan-out benchmark: a store that does what it is told on stdin, a JSON object a line.

    p2p_node.py NAME METADATA PROTOCOL    {"do": "pull", "name": …}  ->  {"seconds": …, …} or {"error": …}

Times called `at` are of the monotonic clock, which virtual hosts share.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from mooncake_hpc.core.request import READ, REQUEST
from mooncake_hpc.native import prepare
from mooncake_hpc.p2p import P2PStore

KILLED = 9
PATIENCE = 300.0  # seconds for one object


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def resident() -> int:
    """Bytes of this process's memory without what it shares, which is what buffers are."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))


class Node:
    """Methods are commands; what they return is the answer."""

    def __init__(self, name: str, metadata: str, protocol: str) -> None:
        self.store = P2PStore(name, metadata, protocol=protocol)
        self._memory = np.zeros(0, np.uint8)

    def prepare(self, size: int) -> dict[str, Any]:
        """Have `size` bytes of memory to receive an object, touched."""
        if len(self._memory) != size:
            if len(self._memory):
                self.store.engine.unregister(self._memory)
            self._memory = self.store.allocate(size)
        self._memory[:] = 0
        return {"resident": resident()}

    def register(self, name: str, size: int, seed: int, shard_size: int = 0) -> dict[str, Any]:
        """Publish seeded content."""
        self.prepare(size)
        prepare.fill(self._memory, seed)
        manifest = self.store.register(name, self._memory, shard_size=shard_size)
        return {"shards": manifest.shards, "address": int(self._memory.ctypes.data)}

    def unregister(self, name: str) -> dict[str, Any]:
        self.store.unregister(name)
        return {}

    def pull(self, name: str, at: float) -> dict[str, Any]:
        """Replicate the object from `at` on, into the memory made ready; it is kept and offered until `drop`."""
        before = resident()

        def work() -> Any:
            return self.store.get_replica(name, self._memory, timeout=PATIENCE).progress

        told, progress = self._timed(at, work)
        return {
            **told, "sources": dict(progress.sources), "raced": progress.raced,
            "failures": sum(progress.failures.values()), "grown": resident() - before,
            "transports": dict(progress.transports),
        }  # fmt: skip

    def check(self, seed: int) -> dict[str, Any]:
        """Compare what has come; by an order of its own, since it would take the cores from who is still pulling."""
        return {"wrong_bytes": prepare.verify(self._memory, seed)}

    def drop(self, name: str) -> dict[str, Any]:
        self.store.delete_replica(name)
        return {}

    def star(self, source: str, address: int, at: float, shard_size: int) -> dict[str, Any]:
        """The original's way: all shards asked of the first holder at once, nothing offered before all is here."""
        size = len(self._memory)
        requests = np.zeros(-(-size // shard_size), REQUEST)
        segment = self.store.engine.open_segment(source)
        offsets = np.arange(len(requests)) * shard_size
        requests["opcode"], requests["target_id"] = READ, segment.id
        requests["local_addr"], requests["remote_addr"] = self._memory.ctypes.data + offsets, address + offsets
        requests["length"] = np.minimum(shard_size, size - offsets)
        told, _ = self._timed(at, lambda: self.store.engine.submit(requests).wait(PATIENCE))
        return told

    def prepare_copy(self) -> dict[str, Any]:
        """Have a source to copy from, touched."""
        self._source = np.ones_like(self._memory)
        return {}

    def copy(self, at: float) -> dict[str, Any]:
        """np.copyto into the memory made ready."""
        return self._timed(at, lambda: np.copyto(self._memory, self._source))[0]

    def cpu(self) -> dict[str, Any]:
        return {"cpu": cpu_seconds()}

    def _timed(self, at: float, work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
        time.sleep(max(0.0, at - time.monotonic()))
        cpu = cpu_seconds()
        result = work()
        return {"seconds": time.monotonic() - at, "cpu": cpu_seconds() - cpu}, result


def main() -> None:
    ctypes.CDLL(None).prctl(1, KILLED)  # PR_SET_PDEATHSIG: nobody is left to tell us what to do
    node = Node(*sys.argv[1:4])
    print(json.dumps({"ready": node.store.name}), flush=True)
    with node.store:
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = getattr(node, order.pop("do"))(**order)
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
