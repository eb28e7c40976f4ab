"""Charts are well-formed, hold the figures, and cannot be made to hold anybody's markup."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from openm6.inference.engine import RankedText
from openm6.serve.playground.page import FIGURES
from openm6.serve.schemas import Distribution

ONE = Distribution(mean=3.0, median=3.0, low=2.0, high=4.5, coverage=0.8)
AHEAD = Distribution(mean=[1.0, 2.0], median=[1.0, 2.0], low=[0.5, 1.0], high=[2.0, 3.0], coverage=0.8)


def test_one_number_is_a_bar_with_its_figures() -> None:
    figure = ElementTree.fromstring(str(FIGURES.chart("body_mass_g", ONE)))
    assert "body mass g" in "".join(figure.itertext()) and "3 [2, 4.5], 80%" in "".join(figure.itertext())
    bar = figure.find(".//rect")
    assert bar is not None and float(bar.attrib["width"]) > 100


def test_a_forecast_goes_on_where_the_past_ends() -> None:
    figure = ElementTree.fromstring(str(FIGURES.chart("sales", AHEAD, [1.0, None, 2.0, 1.5])))
    past, ahead = (line.attrib["points"].split() for line in figure.findall(".//polyline"))
    assert len(past) == 3 and len(ahead) == 2
    assert float(past[-1].split(",")[0]) < float(ahead[0].split(",")[0])


def test_a_series_that_never_changes_can_be_drawn() -> None:
    flat = Distribution(mean=[1.0], median=[1.0], low=[1.0], high=[1.0], coverage=0.8)
    nothing = ONE.model_copy(update={"low": 0.0, "high": 0.0, "median": 0.0})
    for drawn in (FIGURES.chart("x", flat, [1.0]), FIGURES.chart("x", nothing)):
        numbers = [value for one in ElementTree.fromstring(str(drawn)).iter() for value in one.attrib.values()]
        assert numbers and not any(
            word in ("nan", "inf", "-inf") for text in numbers for word in re.split("[ ,]", text)
        )


def test_markup_in_names_stays_text() -> None:
    name = '"><script>alert(1)</script>'
    ranking = [RankedText(index=0, candidate=name, log_likelihood=-2.0, score=-1.0)]
    drawn = "".join(map(str, (FIGURES.chart(name, ONE), FIGURES.ranking(ranking), FIGURES.failure(name, name))))
    assert "<script" not in drawn and "&lt;script&gt;" in drawn


def test_a_vector_is_a_bar_for_each_number() -> None:
    assert len(ElementTree.fromstring(str(FIGURES.vector([0.5, -1.0, 0.0]))).findall("rect")) == 3
    ElementTree.fromstring(str(FIGURES.vector([])))
