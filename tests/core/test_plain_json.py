"""JSON without the three words that are not JSON."""

from __future__ import annotations

import json

import numpy as np

from openm6.core.files import plain_data, to_json

VALUE = {"a": [1.0, float("inf")], "b": {"c": float("nan")}, "d": "nan", "e": 3, "f": (1, -float("inf"))}


def test_numbers_that_are_not_finite_become_null() -> None:
    expected = {"a": [1.0, None], "b": {"c": None}, "d": "nan", "e": 3, "f": [1, None]}
    assert plain_data(VALUE) == expected
    assert json.loads(to_json(VALUE, indent=1)) == expected


def test_numbers_of_numpy_and_half_characters() -> None:
    value = {"a": np.float32(0.5), 3: np.int64(7), "b": [np.float64("nan"), True], "c": "x\ud800"}
    assert json.loads(to_json(value)) == {"a": 0.5, "3": 7, "b": [None, True], "c": "x?"}
