"""What a bench run is: its configuration, its addresses, and who talks to whom under a launcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_hpc import READ, REQUEST, WRITE
from mooncake_hpc.core.errors import ConfigError
from mooncake_hpc.core.memory import system_memory

PATTERNS = ("pairs", "fan_in", "fan_out", "all_to_all")
MATRIX = "matrix"  # every pair by itself: see `bench.matrix`
AUTO_WORKERS = -1  # as many as WorkerPool thinks fit, where there is work for them
OPCODES = {"read": READ, "write": WRITE}


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """One run of the bench. Sizes in bytes, times in seconds. Defaults are those of the original."""

    mode: str = "initiator"  # initiator or target; by rank under a launcher
    metadata_server: str = ""
    local_server_name: str = ""
    segment_id: str = ""
    protocol: str = "auto"
    device_name: str = ""  # RDMA devices, commas between; empty: all
    nic_priority_matrix: str = ""  # a file's name
    auto_discovery: bool = False
    operation: str = "read"
    block_size: int = 65536  # a request
    batch_size: int = 128  # requests submitted together
    threads: int = 12  # submitters
    duration: float = 10.0
    buffer_size: int = 1 << 30  # a buffer; a target publishes at least two
    pattern: str = "pairs"
    workers: int = AUTO_WORKERS  # processes that prepare and verify buffers
    warmup: int = 3  # batches a submitter before the timed window
    timeout: float = 30.0  # for a batch, on top of 1 ns a byte; and for peers to appear
    verify: bool = False
    verify_interval: int = 16  # batches a submitter between two changes of the pattern
    seed: int = 1
    bind_all: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "batch_size", "threads", "buffer_size", "verify_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}={getattr(self, name)} must be at least 1")
        for name in ("warmup", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name}={getattr(self, name)} must not be negative")
        if not AUTO_WORKERS <= self.workers <= 64:
            raise ConfigError(f"--workers={self.workers} must be 0 to 64, or -1 for a number that fits the cores")
        for name in ("duration", "timeout"):
            if not 0 < getattr(self, name) < 1e9:
                raise ConfigError(f"--{name}={getattr(self, name)} must be above 0 and below 1e9 seconds")
        if self.operation not in OPCODES:
            raise ConfigError(f"--operation={self.operation}: expected one of {', '.join(OPCODES)}")

    def check_memory(self) -> None:
        """Raise ConfigError where this machine is too small for the run."""
        memory = system_memory(swap=False)
        for text, size in (
            ("block_size × batch_size × threads", self.footprint),
            ("buffer_size", self.buffer_size),
        ):
            if size > memory:
                raise ConfigError(f"{text} = {size} bytes, but this machine has {memory} bytes of memory")

    @property
    def footprint(self) -> int:
        """Bytes that an initiator addresses on each side."""
        return self.block_size * self.batch_size * self.threads

    @property
    def batch_bytes(self) -> int:
        return self.block_size * self.batch_size

    @property
    def batch_timeout(self) -> float:
        """Seconds after which a batch has failed: as the original's synchronous calls, plus 1 ns a byte."""
        return self.timeout + self.batch_bytes * 1e-9

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class Remote:
    """Where slots lie in one target: its segment's id, and the address of the initiator's region."""

    target_id: int
    address: int


def build_requests(config: BenchConfig, thread: int, local: int, remotes: Sequence[Remote]) -> npt.NDArray[Any]:
    """The batch that submitter `thread` submits again and again, as a REQUEST array of `batch_size`.

    Request j uses slot j·threads + thread, as in the original: `local` + block_size·slot on this side, the
    same offset in the region on the other. Slot s goes to target s modulo the number of targets.
    """
    slots = np.arange(config.batch_size, dtype=np.uint64) * np.uint64(config.threads) + np.uint64(thread)
    offsets = slots * np.uint64(config.block_size)
    which = (slots % np.uint64(len(remotes))).astype(np.intp)
    requests = np.zeros(config.batch_size, REQUEST)
    requests["opcode"] = OPCODES[config.operation]
    requests["target_id"] = np.array([r.target_id for r in remotes], np.int32)[which]
    requests["local_addr"] = np.uint64(local) + offsets
    requests["remote_addr"] = np.array([r.address for r in remotes], np.uint64)[which] + offsets
    requests["length"] = config.block_size
    return requests


def cover_requests(batches: Sequence[npt.NDArray[Any]], opcode: int) -> npt.NDArray[Any]:
    """All submitters' requests as one batch, by address: to seed, poison or read the other side."""
    requests = np.concatenate(batches, dtype=REQUEST)  # numpy would drop the padding
    requests["opcode"] = opcode
    return requests[np.argsort(requests["local_addr"])]


def check_room(config: BenchConfig, name: str, index: int, length: int, region: int) -> None:
    """Raise ConfigError where buffer `index`, `length` bytes, of segment `name` does not hold our region."""
    need = (region + 1) * config.footprint
    if length < need:
        sizes = f"block_size {config.block_size} × batch_size {config.batch_size} × threads {config.threads}"
        where = f" in region {region}" if region else ""
        raise ConfigError(
            f"segment {name}: buffer {index} has {length} bytes, but {sizes}{where} needs {need}: "
            f"start the target with --buffer_size={need} or make a batch smaller"
        )


@dataclass(frozen=True, slots=True)
class Role:
    """What a rank does: the ranks whose memory it addresses, and the ranks that address its memory."""

    targets: tuple[int, ...] = ()
    initiators: tuple[int, ...] = ()

    def region(self, initiator: int) -> int:
        """Which region of this rank's buffers belongs to `initiator`: regions never overlap."""
        return self.initiators.index(initiator)


def roles(pattern: str, size: int) -> tuple[Role, ...]:
    """The role of each of `size` ranks.

    pairs: rank r + size/2 addresses rank r, so that ranks placed in blocks pair across hosts. fan_in: all
    address rank 0. fan_out: rank 0 addresses all. all_to_all: everybody addresses everybody else.
    """
    if pattern not in PATTERNS:
        raise ConfigError(f"--pattern={pattern}: expected one of {', '.join(PATTERNS)}")
    if size < 2 or (pattern == "pairs" and size % 2):
        need = "an even number of ranks" if pattern == "pairs" else "at least 2 ranks"
        raise ConfigError(
            f"--pattern={pattern} needs {need}, not {size}: mpirun -n {size + 1}, NP={size + 1} launch/bench"
        )
    others = tuple(range(1, size))
    if pattern == "fan_in":
        return (Role(initiators=others), *(Role(targets=(0,)) for _ in others))
    if pattern == "fan_out":
        return (Role(targets=others), *(Role(initiators=(0,)) for _ in others))
    if pattern == "all_to_all":
        rest = [tuple(r for r in range(size) if r != me) for me in range(size)]
        return tuple(Role(targets=r, initiators=r) for r in rest)
    half = size // 2
    return (
        *(Role(initiators=(r + half,)) for r in range(half)),
        *(Role(targets=(r,)) for r in range(half)),
    )
