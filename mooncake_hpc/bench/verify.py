"""`--verify`: rounds in which the destination is poisoned, the source patterned, and every byte compared.

The pattern is a function of the seed, the absolute offset in the target's buffer and the round, so that a
byte that is stale, misplaced or missing shows. Only the initiator acts: it patterns and poisons the other
side by transfers of its own, outside the timed window, so that any target will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mooncake_hpc import READ, WRITE
from mooncake_hpc.bench.plan import BenchConfig, cover_requests

if TYPE_CHECKING:
    from mooncake_hpc.workers.pool import WorkerPool

PREPARE_TIMEOUT = 300.0  # seconds for filling or comparing all of an initiator's buffers
Bytes = npt.NDArray[np.uint8]


class Transfer(Protocol):
    """Submits requests and waits for them, or raises."""

    def __call__(self, requests: npt.NDArray[Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Span:
    """Contiguous bytes of a local buffer that mirror the target's from `offset` on."""

    array: Bytes
    offset: int


def spans_of(buffers: Sequence[tuple[int, Bytes]], batches: Sequence[npt.NDArray[Any]], region: int) -> list[Span]:
    """The local spans that the batches address, merged where they adjoin.

    `buffers` are (address, array); `region` is the offset of the initiator's region in the target's buffer.
    The offset of a byte in the region is its offset in the local buffer, on both sides.
    """
    spans = []
    requests = np.concatenate(batches)
    for address, array in buffers:
        offsets = requests["local_addr"].astype(np.int64) - address
        mine = (offsets >= 0) & (offsets < array.size)
        starts = np.sort(offsets[mine])
        lengths = requests["length"][mine].astype(np.int64)[np.argsort(offsets[mine])]
        edges = np.flatnonzero(starts[1:] != starts[:-1] + lengths[:-1]) + 1
        for part, sizes in zip(np.split(starts, edges), np.split(lengths, edges), strict=True):
            if part.size:
                begin, end = int(part[0]), int(part[-1] + sizes[-1])
                spans.append(Span(array[begin:end], region + begin))
    return spans


class Verifier:
    """Prepares a round and checks it; counts compared and wrong bytes over all rounds."""

    def __init__(
        self,
        config: BenchConfig,
        pool: WorkerPool,
        transfer: Transfer,
        spans: Sequence[Span],
        batches: Sequence[npt.NDArray[Any]],
    ) -> None:
        self._config, self._pool, self._transfer, self._spans = config, pool, transfer, spans
        self._to_target = cover_requests(batches, WRITE)
        self._from_target = cover_requests(batches, READ)
        self.compared = self.wrong = self.rounds = 0

    def begin(self) -> None:
        """Start the next round: pattern in the source, poison in the destination."""
        self.rounds += 1
        if self._config.operation == "read":
            self._fill()
            self._transfer(self._to_target)
            self._poison()
        else:
            if self.rounds == 1:  # later, what the target holds is an older round's pattern, and as wrong
                self._poison()
                self._transfer(self._to_target)
            self._fill()

    def check(self) -> int:
        """Compare the round's destination, after reading it back from the target for a WRITE; wrong bytes."""
        if self._config.operation == "write":
            self._poison()
            self._transfer(self._from_target)
        seed, verify = self._config.seed, self._pool.verify
        jobs = [verify(span.array, seed, span.offset, self.rounds) for span in self._spans]
        wrong = sum(job.wait(PREPARE_TIMEOUT) for job in jobs)
        self.compared += sum(span.array.size for span in self._spans)
        self.wrong += wrong
        return wrong

    def _fill(self) -> None:
        seed, fill = self._config.seed, self._pool.fill
        for job in [fill(span.array, seed, span.offset, self.rounds) for span in self._spans]:
            job.wait(PREPARE_TIMEOUT)

    def _poison(self) -> None:
        for job in [self._pool.poison(span.array) for span in self._spans]:
            job.wait(PREPARE_TIMEOUT)
