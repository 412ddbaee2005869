"""Polling before sleeping, which learns whether it pays.

Polling saves a sleep and a wake-up when the answer is near, and steals the core from whoever should answer when both
share one. So a wait whose polling was in vain makes the next ones sleep at once: one, then 3, 7, … MOST_SKIPPED of
them, until polling succeeds again. Sleepers are also put on an idle core by the scheduler, which pollers never are.

A *spinner* is three int64 words; a constant below is a word's byte offset.
"""

from __future__ import annotations

from mooncake_hpc.native.atomics import get, put
from mooncake_hpc.native.compile import kernel

LIMIT = 0  # nanoseconds to poll at most
SKIP = 8  # waits that still sleep at once
PENALTY = 16  # waits that were skipped last time; 0 after a success

MOST_SKIPPED = 63


@kernel
def forget(spinner):
    """What has been learnt is of another peer."""
    put(spinner + SKIP, 0)
    put(spinner + PENALTY, 0)


@kernel
def budget(spinner):
    """How many nanoseconds this wait may poll; to be asked once a wait."""
    skip = get(spinner + SKIP)
    if skip > 0:
        put(spinner + SKIP, skip - 1)
        return 0
    return get(spinner + LIMIT)


@kernel
def paid(spinner):
    """Polling ended a wait."""
    put(spinner + PENALTY, 0)


@kernel
def failed(spinner):
    """A wait has polled all its budget in vain."""
    penalty = min(2 * get(spinner + PENALTY) + 1, MOST_SKIPPED)
    put(spinner + PENALTY, penalty)
    put(spinner + SKIP, penalty)
