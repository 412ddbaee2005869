"""Which of several failing ranks tells, and what: each cause once, whoever hears of whom."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from mooncake_hpc.jobs import failures as verdict
from mooncake_hpc.jobs.failures import Failure, Verdict, causes


def failure(rank: int, cause: str, *suspects: int) -> Failure:
    return Failure(rank, f"rank {rank}: {cause}", cause, frozenset(suspects))


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ([failure(2, "x"), failure(0, "x"), failure(1, "x")], [0]),
        ([failure(0, "x"), failure(1, "y"), failure(2, "x")], [0, 1]),
        ([failure(0, "lost a", 3), failure(1, "lost b", 3)], [0]),
        ([failure(0, "lost", 3), failure(1, "lost", 4)], [0, 1]),
        ([failure(0, "lost", 1), failure(1, "unwell"), failure(2, "lost", 1)], [1]),
        ([failure(0, "lost", 1, 3), failure(1, "unwell")], [0, 1]),  # rank 3 is not explained
        ([failure(1, "lost", 0), failure(2, "lost", 0, 1)], [1]),  # rank 1 was about to end
        ([failure(0, "lost", 1), failure(1, "lost", 0)], [0]),  # the network between them
    ],
)
def test_causes(failures: Sequence[Failure], told: list[int]) -> None:
    assert [each.rank for each in causes(failures)] == told


@dataclass
class Comm:
    """Ranks in threads: `boxes[i]` has what rank i is sent; those in `dead` cannot be written to."""

    boxes: list[queue.SimpleQueue[Failure]]
    rank: int
    dead: set[int] = field(default_factory=set)

    def Get_size(self) -> int:
        return len(self.boxes)

    def isend(self, message: Failure, dest: int, tag: int) -> None:
        if dest in self.dead:
            raise RuntimeError("MPI_ERR_OTHER")
        self.boxes[dest].put(message)

    def iprobe(self, tag: int) -> bool:
        return not self.boxes[self.rank].empty()

    def improbe(self, tag: int) -> Any:
        try:
            message = self.boxes[self.rank].get_nowait()
        except queue.Empty:
            return None
        return Message(message)


@dataclass
class Message:
    content: Failure

    def recv(self) -> Failure:
        return self.content


def tell(failures: dict[int, tuple[float, Failure]], size: int, dead: set[int]) -> dict[int, list[str]]:
    """What each failing rank tells; they fail after so many seconds, and the first that tells ends the others."""
    boxes: list[queue.SimpleQueue[Failure]] = [queue.SimpleQueue() for _ in range(size)]
    told: dict[int, list[str]] = {}
    over = threading.Event()

    def run(rank: int, after: float, mine: Failure) -> None:
        if not over.wait(after):
            failures = Verdict(Comm(boxes, rank, dead), mine).to_tell()
            if not over.is_set():
                told[rank] = [each.line for each in failures]
                over.set()

    threads = [threading.Thread(target=run, args=(rank, *when)) for rank, when in failures.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


@pytest.mark.parametrize("size", [4, 100])
@pytest.mark.parametrize("late", [0.0, 0.05, 0.25])
@pytest.mark.slow
def test_one_tells(monkeypatch: pytest.MonkeyPatch, size: int, late: float) -> None:
    """Though the lowest rank finds out last, and another one is dead to MPI too."""
    monkeypatch.setattr(verdict, "HOLD", 0.15)
    monkeypatch.setattr(verdict, "QUIET", 0.3)
    failures = {rank: (0.0, failure(rank, f"lost by {rank}", 1)) for rank in (2, 3, size - 1)}
    failures[0] = late, failure(0, "lost by 0", 1)
    told = tell(failures, size, dead={1})
    assert list(told.values()) in ([["rank 0: lost by 0"]], [["rank 2: lost by 2"]]), told


def test_who_should_have_told_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "HOLD", 0.1)
    monkeypatch.setattr(verdict, "QUIET", 0.1)
    boxes: list[queue.SimpleQueue[Failure]] = [queue.SimpleQueue() for _ in range(2)]
    boxes[1].put(failure(0, "unwell"))
    assert Verdict(Comm(boxes, 1), mine := failure(1, "lost", 0)).to_tell() == [mine]


def test_who_announced_its_failure_is_not_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its engine is closed by now, and it takes long to end."""
    monkeypatch.setattr(verdict, "HOLD", 0.1)
    monkeypatch.setattr(verdict, "QUIET", 0.1)
    boxes: list[queue.SimpleQueue[Failure]] = [queue.SimpleQueue() for _ in range(3)]
    Verdict(Comm(boxes, 2), failure(2, "lost", 1)).announce()
    (told,) = Verdict(Comm(boxes, 0), failure(0, "lost", 1, 2)).to_tell()
    assert (told.rank, told.suspects) == (0, {1})


def test_a_rank_without_others_tells_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "HOLD", 100.0)
    assert Verdict(Comm([queue.SimpleQueue()], 0), mine := failure(0, "lost")).to_tell() == [mine]
