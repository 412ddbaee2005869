"""A peer that is replaced again and again leaves next to nothing in an engine that lives on."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

import mooncake_hpc as mh
from mooncake_hpc.core.errors import PeerLost
from mooncake_hpc.core.request import READ, REQUEST

ROUNDS, WARM = 12, 4
MOST_BYTES = 4_000  # a replacement; a lane alone has a ring of 32 KiB


@pytest.mark.parametrize("protocol", ["tcp", "auto"])
def test_a_replaced_segment_is_let_go_and_its_id_is_never_used_again(protocol: str) -> None:
    store = f"memory://replaced-{protocol}"
    with mh.TransferEngine("reader:1", store, protocol=protocol) as reader:
        block, ids, kept = reader.allocate(4096), [], []
        tracemalloc.start()
        try:
            for round_ in range(ROUNDS):
                with mh.TransferEngine("peer:1", store, protocol=protocol) as peer:
                    peer.allocate(4096)[:] = round_ + 1
                    segment = reader.open_segment("peer:1")
                    address = segment.buffers[0].address
                    reader.read(block, segment, address)
                    assert (block == round_ + 1).all()
                    for old in ids:
                        with pytest.raises(PeerLost, match="'peer:1' was replaced: open the segment again"):
                            reader.transfer(np.array([(READ, old, block.ctypes.data, address, 64)], REQUEST), 5)
                    ids.append(segment.id)
                    del segment, peer
                gc.collect()
                kept.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert ids == list(range(ROUNDS))
    assert (kept[-1] - kept[WARM]) / (ROUNDS - 1 - WARM) < MOST_BYTES
