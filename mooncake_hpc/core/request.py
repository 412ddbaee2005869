"""The record that a caller fills to ask for a transfer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

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

Requests = npt.NDArray[Any]
