"""Artificial series: the same for everyone, others each epoch, and of many forms."""

from __future__ import annotations

import numpy as np
import pytest

from openm6.core.errors import ConfigError
from openm6.core.seeds import numpy_generator
from openm6.data.sources import open_sources
from openm6.data.synthetic import SyntheticSeriesConfig, draw_series
from openm6.modalities.series import SeriesStats, fit_series
from openm6.tasks.registry import TASKS

CONFIG = SyntheticSeriesConfig(context=60, horizon=12, count=50, test_count=20)


def test_series_are_functions_of_index_and_epoch() -> None:
    train, test = (open_sources({"made": CONFIG}, split)["made"] for split in ("train", "test"))
    assert len(train) == 50 and len(test) == 20 and not len(open_sources({"made": CONFIG}, "validation")["made"])
    assert train.at(3, 1) == train.at(3, 1) != train.at(3, 2)
    assert train[3]["series"] != test[3]["series"]
    record = train[0]
    (values,) = record["series"].values()
    assert len(values) == record["extra"]["context"] + 12 and 24 <= record["extra"]["context"] <= 60
    example = TASKS["time_series_forecasting"].example(record, numpy_generator(0))
    assert example.target.raw.stats == SeriesStats(record["extra"]["period"], record["extra"]["log"])


def test_what_is_drawn_is_finite_and_varied() -> None:
    drawn = [draw_series(numpy_generator(0, "t", index), 96) for index in range(400)]
    values = [one for one, _, _ in drawn]
    assert all(np.isfinite(one[~np.isnan(one)]).all() and np.isfinite(one[-1]) for one in values)
    periods = np.array([period for _, period, _ in drawn])
    assert 0.3 < (periods > 1).mean() < 0.8 and len(set(periods.tolist())) > 10
    assert 0.3 < np.mean([log for _, _, log in drawn]) < 0.5
    assert 0.05 < np.mean([np.isnan(one).any() for one in values]) < 0.3
    assert all((one[np.isfinite(one)] > 0).all() for one, _, log in drawn if log)


def test_a_strong_season_is_the_one_that_is_found() -> None:
    found = []
    for index in range(300):
        values, period, log = draw_series(numpy_generator(1, "t", index), 96)
        if 2 < period < 40 and np.isfinite(values).all():
            found.append(fit_series([np.log(values) if log else values]).period == period)
    assert np.mean(found) > 0.4


def test_bounds_are_checked() -> None:
    with pytest.raises((ValueError, ConfigError)):
        SyntheticSeriesConfig(context=4)
    with pytest.raises(ValueError, match="min_context 24 exceeds context 16"):
        SyntheticSeriesConfig(context=16)
