"""Requests and batches: what a caller submits and what it waits on."""

from __future__ import annotations

import numpy as np

READ, WRITE = 0, 1  # the original's opcodes, as on its wire

REQUEST = np.dtype(
    {
        "names": ["opcode", "target_id", "local_addr", "remote_addr", "length"],
        "formats": ["u1", "i4", "u8", "u8", "u8"],
        "offsets": [0, 4, 8, 16, 24],
        "itemsize": 32,
    }
)
"""One request: `length` bytes between our `local_addr` and `remote_addr` in segment `target_id`."""
