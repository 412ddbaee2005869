"""The digest of what a batch reads, each request taken in as soon as it has come: its bytes are in the cache still."""

from __future__ import annotations

from mooncake_hpc.native.atomics import get, get_byte, now
from mooncake_hpc.native.compile import kernel
from mooncake_hpc.native.xxh3 import feed
from mooncake_hpc.transports.progress_kernels import await_request
from mooncake_hpc.transports.queue_kernels import REQUESTS, STATUS


@kernel
def digest_requests(lane, batch, first, end, until, state):
    """Wait for the requests from `first` to `end`, one after the other, and feed their bytes to the digest `state`:
    the number of the first that is not done, since it failed or `until` has come."""
    number = first
    while number < end:
        await_request(lane, batch, number, until)
        if get_byte(get(batch + STATUS) + number) != 1:
            break
        record = get(batch + REQUESTS) + 32 * number  # as in `request.REQUEST`
        feed(state, get(record + 8), get(record + 8), get(record + 24))
        number += 1
        if now() >= until:
            break
    return number
