"""What a person types becomes what a scenario takes, and back."""

from __future__ import annotations

from typing import Any

import pytest

from openm6.base.errors import DataError
from openm6.serve.playground.inputs import read_typed, write_typed


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("text", "seven"),
        ("numbers", {"mass": 3.5, "length": None, "digit": 7.0}),
        ("series", {"name": "price", "values": [3.5, None, 4.0]}),
        ("candidates", ["a cup", "一个杯子"]),
        ("box", [0.25, 0.0, 1.0, 0.5]),
        ("stretch", [0.2, 0.5]),
    ],
)
def test_what_is_shown_reads_back(kind: Any, value: Any) -> None:
    assert read_typed(kind, write_typed(kind, value)) == value


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("numbers", "mass: 3.5; length = ", {"mass": 3.5, "length": None}),
        ("numbers", "质量：3", {"质量": 3.0}),
        ("series", "1, 2，3", {"name": "value", "values": [1.0, 2.0, 3.0]}),
        ("candidates", "a\n\n b \n", ["a", "b"]),
    ],
)
def test_it_is_read_as_people_write(kind: Any, text: str, value: Any) -> None:
    assert read_typed(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text"), [("numbers", "mass"), ("numbers", "mass = x"), ("series", "p: 1, b")]
)
def test_what_cannot_be_read_is_one_sentence(kind: Any, text: str) -> None:
    with pytest.raises(DataError) as caught:
        read_typed(kind, text)
    assert "\n" not in str(caught.value)
