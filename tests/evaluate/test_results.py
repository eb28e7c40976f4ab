"""Bootstrap intervals: coverage of the true mean, and records that depend on each other."""

from __future__ import annotations

import numpy as np
import pytest

from openm6.evaluate.results import bootstrap_interval


@pytest.mark.parametrize("count", [8, 40])
def test_the_interval_covers_the_true_mean(count: int) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.exponential(2.0, count), trial)
        assert low < high
        covered += low <= 2.0 <= high
    assert 0.8 <= covered / 200 <= 0.99


def test_records_of_one_block_are_no_independent_evidence() -> None:
    """Each of 12 values is seen eight times: without blocks the interval covers the true mean far too rarely."""
    rng = np.random.default_rng(0)
    blocks = [str(n // 8) for n in range(96)]
    with_blocks = without = 0
    for trial in range(150):
        values = rng.normal(0.0, 1.0, 12).repeat(8)
        low, high = bootstrap_interval(values, trial, blocks)
        with_blocks += low <= 0.0 <= high
        low, high = bootstrap_interval(values, trial)
        without += low <= 0.0 <= high
    assert with_blocks / 150 > 0.8 > 0.6 > without / 150


def test_blocks_of_one_record_change_nothing() -> None:
    values = np.arange(9.0)
    assert bootstrap_interval(values, 4, [str(n) for n in range(9)]) == bootstrap_interval(values, 4)


def test_many_records_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_interval(values, 4)
    monkeypatch.setattr("openm6.evaluate.results.DRAWN", 700)
    assert bootstrap_interval(values, 4) == whole


def test_the_interval_of_little() -> None:
    for values, blocks in ((np.zeros(0), ()), (np.array([3.0]), ()), (np.arange(4.0), ["a"] * 4)):
        assert all(np.isnan(end) for end in bootstrap_interval(values, 0, blocks)), "one block has no spread"
    assert bootstrap_interval(np.arange(9.0), 4) == bootstrap_interval(np.arange(9.0), 4)


def test_weights_count_as_so_many_records() -> None:
    weights = np.repeat([1 / 40, 1 / 10], [40, 10])
    assert bootstrap_interval(np.ones(50), 0, weights=weights) == (1.0, 1.0)
    values, counts = np.random.default_rng(0).normal(size=30), np.arange(1, 31)
    repeated = bootstrap_interval(values.repeat(counts), 4, [str(n) for n in np.arange(30).repeat(counts)])
    assert bootstrap_interval(values, 4, weights=counts / 7) == pytest.approx(repeated)
