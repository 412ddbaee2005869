"""One source's board, read over the wire now and then, as long as the source does not hold everything."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mooncake_hpc.core.errors import PeerLost, TransferError
from mooncake_hpc.core.request import READ, REQUEST
from mooncake_hpc.p2p.availability import News, read_board
from mooncake_hpc.p2p.catalog import Holder
from mooncake_hpc.p2p.layout import Bytes

if TYPE_CHECKING:
    from mooncake_hpc.engine.batch import Batch
    from mooncake_hpc.engine.engine import TransferEngine
    from mooncake_hpc.engine.remote_segment import Segment

log = logging.getLogger(__name__)

REST = (0.25, 8.0)  # seconds after a failure until the board is looked at again: at first, and at most


class Watch:
    """Reads the holder's board into `copy` and calls `news`, which returns the seconds until the next look, or None."""

    def __init__(
        self, engine: TransferEngine, holder: Holder, copy: Bytes, news: Callable[[Holder, News], float | None]
    ) -> None:
        self._engine, self._holder, self._copy, self._news = engine, holder, copy, news
        self._batch: Batch | None = None
        self._since = 0.0
        self._next = math.inf if holder.board is None or holder.have.all() else 0.0
        self._rest = REST[0]

    @property
    def left(self) -> float | None:
        """Seconds until the next look, None: there is none."""
        return None if self._next == math.inf else max(0.0, self._next - time.monotonic())

    def look(self, segment: Segment, patience: float | None, silence: float) -> None:
        """Take in the board that was asked for, or ask for it when it is time. Where there is nothing else to wait for,
        `patience` are seconds to wait for it, and `silence` those after which the source counts as gone.

        Raises PeerLost, and what the transfer failed with.
        """
        if self._batch is None:
            if self._holder.board is None or time.monotonic() < self._next:
                return
            requests = np.zeros(1, REQUEST)
            requests["opcode"], requests["target_id"], requests["length"] = READ, segment.id, self._copy.nbytes
            requests["local_addr"], requests["remote_addr"] = self._copy.ctypes.data, self._holder.board.address
            self._batch, self._since = self._engine.submit(requests), time.monotonic()
        batch = self._batch
        if not (batch.done if patience is None else batch.join(patience)):
            if patience is not None and time.monotonic() - self._since > silence:
                raise PeerLost(f"segment {self._holder.segment!r} does not answer")
            return
        self._batch = None
        if (error := batch.error) is not None:
            raise error
        self._tell()

    def rest(self) -> None:
        """The source has failed: look later, and later still each time."""
        self.drop()
        if self._next != math.inf:
            self._next = time.monotonic() + self._rest
            self._rest = min(2 * self._rest, REST[1])

    def drop(self) -> None:
        """On return nothing writes to the copy."""
        if self._batch is not None:
            end_batch(self._batch)
            self._batch = None

    def _tell(self) -> None:
        assert self._holder.board is not None
        found = read_board(self._copy, self._holder.board.token, len(self._holder.have))
        if found is None:
            raise PeerLost(f"segment {self._holder.segment!r} does not offer the object any more")
        self._rest = REST[0]
        pause = self._news(self._holder, found)
        self._next = math.inf if pause is None else time.monotonic() + pause


def end_batch(batch: Batch) -> None:
    """Cancel, until it is done for certain: the memory is somebody's."""
    while not batch.done:
        try:
            batch.cancel()
        except TransferError:
            log.warning("a batch does not end", exc_info=True)
