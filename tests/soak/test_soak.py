"""The soak for half a minute, and that its figures can fail."""

from __future__ import annotations

import pytest

from soak import figures
from soak.run import Soak


@pytest.mark.slow
def test_half_a_minute() -> None:
    """Too short to tell a slow leak; one of each step shows."""
    soak = Soak(25.0, seed=2)
    soak.run()
    assert not soak.failures
    for flat in figures.flatness(soak.samples):
        assert flat.grown <= 4 * figures.TOLERANCE[flat.what], flat.line()
    assert soak.killed >= 1 and soak.stopped >= 1
    assert soak.counts["write_and_read"] >= 50 and soak.counts["pull"] >= 5, soak.counts


def line(values: list[float]) -> figures.Flatness:
    (found,) = figures.flatness({("w", "descriptors"): list(enumerate(values))})
    return found


def test_what_grows_is_not_flat() -> None:
    noise = [0.0, 4.0, 1.0, 3.0] * 20
    assert line([500.0 + 9 * n for n in range(10)] + noise).flat, "the warm-up counts"
    assert line(noise).flat
    assert not line([value + 0.2 * number for number, value in enumerate(noise)]).flat
