"""JSON without the three words that are not JSON."""

from __future__ import annotations

import json

from openm6.base.plain_json import finite_or_none, to_json

VALUE = {"a": [1.0, float("inf")], "b": {"c": float("nan")}, "d": "nan", "e": 3, "f": (1, -float("inf"))}


def test_numbers_that_are_not_finite_become_null() -> None:
    expected = {"a": [1.0, None], "b": {"c": None}, "d": "nan", "e": 3, "f": [1, None]}
    assert finite_or_none(VALUE) == expected
    assert json.loads(to_json(VALUE, indent=1)) == expected
