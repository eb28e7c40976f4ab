"""Numbers as a person types them."""

from __future__ import annotations

import pytest

from openm6.base.errors import ConfigError
from openm6.generate.parse import parse_numbers, parse_series, parse_shares
from openm6.modalities.numbers import NumberSeries


def test_words_as_columns() -> None:
    assert parse_numbers("mass=3.5, length=,x=-1e3") == {"mass": 3.5, "length": None, "x": -1000.0}
    assert parse_numbers(None) is None


@pytest.mark.parametrize("words", ["a", "a=x", "=3", "a=1,,b=2", "a=nan", "a=inf", "a=-1e999", "a=1=2"])
def test_columns_that_are_none(words: str) -> None:
    with pytest.raises(ConfigError, match=r"^--numbers has '.*', which must look like name=3.5"):
        parse_numbers(words)


def test_words_as_shares() -> None:
    assert parse_shares("0, 0.25,1,.5", 4, "--hole") == (0.0, 0.25, 1.0, 0.5)
    assert parse_shares(None, 4, "--hole") is None
    for words in ("", "0,1", "a,b,c,d", "0,0,1,1,1"):
        with pytest.raises(ConfigError, match="must be 4 numbers"):
            parse_shares(words, 4, "--hole")


def test_words_as_a_series() -> None:
    assert parse_series("t=1,,-2.5") == NumberSeries("t", [1.0, None, -2.5])
    assert parse_series(None) is None
    for words in ("t", "=1,2"):
        with pytest.raises(ConfigError, match="must look like temp_max="):
            parse_series(words)
    with pytest.raises(ConfigError, match="--series has 'a' as value 1"):
        parse_series("t=a,b")


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_a_series_holds_finite_numbers(value: str) -> None:
    with pytest.raises(
        ConfigError, match=f"--series has '{value}' as value 2, which must be a finite number"
    ):
        parse_series(f"t=1,{value}")
