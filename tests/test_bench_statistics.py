"""Histograms: accuracy against numpy, merging, extremes."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from mooncake_hpc.bench.statistics import BUCKETS, PERCENTILES, Histogram, bucket, bucket_middle


def test_percentiles_are_within_a_bucket_of_numpys() -> None:
    values = np.random.default_rng(1).lognormal(10, 1.5, 100_000).astype(np.int64)
    histogram = Histogram()
    histogram.add(values)
    for percent in PERCENTILES:
        exact = np.percentile(values, percent, method="inverted_cdf")
        assert histogram.percentile(percent) == pytest.approx(exact, rel=1 / 64)
    assert histogram.greatest == values.max() and histogram.least == values.min()
    assert histogram.mean() == pytest.approx(values.mean())
    assert histogram.total == values.size


def test_a_merge_equals_one_histogram_and_is_no_average() -> None:
    fast, slow = np.full(9000, 1000), np.full(1000, 1_000_000)
    one, two, both = Histogram(), Histogram(), Histogram()
    one.add(fast)
    two.add(slow)
    both.add(np.concatenate([fast, slow]))
    one.merge(two)
    one.merge(Histogram())
    assert one.summary() == both.summary()
    assert one.percentile(50) == pytest.approx(1000, rel=0.02)
    assert one.percentile(99) == pytest.approx(1_000_000, rel=0.02)


def test_every_bucket_holds_its_own_middle_and_bounds_grow() -> None:
    middles = np.array([bucket_middle(i) for i in range(BUCKETS)])
    assert (np.diff(middles) > 0).all()
    assert (bucket(middles.astype(np.int64)) == np.arange(BUCKETS)).all()
    assert bucket(np.array([0, 1, 63, 64, 127, 128, 129, 130, 1 << 60])).tolist() == [
        *(0, 1, 63, 64, 127, 128, 128, 129),
        BUCKETS - 1,
    ]


def test_portions_and_weights_count() -> None:
    histogram = Histogram()
    for first in range(1, 10_001, 4096):
        histogram.add(array("q", range(first, min(first + 4096, 10_001))))
    assert histogram.total == 10_000 and histogram.greatest == 10_000 and histogram.least == 1
    weighted = Histogram()
    weighted.add([100], weight=5)
    assert weighted.total == 5 and weighted.mean() == 100


def test_empty_and_backwards() -> None:
    assert Histogram().summary()["p99.9"] == 0 and Histogram().mean() == 0
    with pytest.raises(ValueError, match="backwards"):
        Histogram().add([-1])
