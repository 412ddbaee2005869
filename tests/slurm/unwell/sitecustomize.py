"""Makes a rank of a job fail: UNWELL="<rank> <how>", with this folder in PYTHONPATH. Python runs it at its start."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable


def _hang() -> None:
    time.sleep(600)


def _raise() -> None:
    raise RuntimeError("this rank is unwell")


WAYS: dict[str, Callable[[], object]] = {
    "raises": _raise,
    "exits": lambda: os._exit(3),
    "leaves": lambda: sys.exit(0),  # as if all were well, but without a result
    "hangs": _hang,
}


def main() -> None:
    rank, how = os.environ.get("UNWELL", "- -").split()
    if os.environ.get("PMI_RANK", os.environ.get("PMIX_RANK")) != rank:
        return
    if how == "does-not-start":
        _hang()
    if how == "cannot-be-reached":  # there it is the others' own address
        os.environ["MC_TCP_BIND_ADDRESS"] = "127.0.0.2"
        return
    from mooncake_hpc.bench import job, node

    if how == "hangs-in-set-up":
        job.open_engine = lambda *words: _hang()  # type: ignore[assignment,return-value]
        return

    def run(self: node.Initiator, *words: object) -> None:
        time.sleep(1)  # the others are in their timed window by then
        WAYS[how]()

    node.Initiator.run = run  # type: ignore[method-assign,assignment]


main()
