"""Numbers: what may be missing, what is refused, and the loss against direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openm6.core.errors import DataError
from openm6.modalities.histogram import LIMIT, one_hot_bins
from openm6.modalities.numbers import Numbers, NumbersIn, NumbersOut
from openm6.modalities.series import NumberSeries
from openm6.modalities.text import Text, train_tokenizer

SCALES = {"body_mass": (4000.0, 800.0), "length": (40.0, 5.0)}


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return Numbers(Text(train_tokenizer(["body mass", "length"], 300)), SCALES, {})


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("missing", [None, math.nan, float("nan")])
def test_missing_values_are_seen_as_missing_and_never_learned(numbers: Numbers, missing: float | None) -> None:
    tokens = numbers.target({"body_mass": missing, "length": 41.0})
    assert tokens.learn.tolist() == [False, True]
    assert tokens.arrays["observed"].tolist() == [False, True]
    torch.manual_seed(0)
    embed = NumbersIn(16).embed
    read = numbers.source({"body_mass": missing}).arrays
    other = {**read, "values": read["values"] + 1}
    assert torch.equal(embed(as_tensors(read)), embed(as_tensors(other))), "what is not there must not show"


def test_what_is_missing_weighs_nothing(numbers: Numbers) -> None:
    torch.manual_seed(0)
    adapter, hidden = NumbersOut(16).requires_grad_(False), torch.randn(2, 16)
    arrays = numbers.target({"length": 41.0, "body_mass": None}).arrays
    place = one_hot_bins(torch.from_numpy(arrays["values"])).argmax(-1)
    nll = adapter.nll(hidden, as_tensors(arrays))
    assert float(nll[0]) == pytest.approx(-float(adapter.logits(hidden).log_softmax(-1)[0, place[0]]), rel=1e-5)
    assert float(nll[1]) == 0


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"length": math.inf}, "length is infinite"),
        ({"length": -math.inf}, "length is infinite"),
        ({"length": "tall"}, "length='tall' is not a number"),
        ({"lenght": 3.0}, "did you mean 'length'"),
        ({}, "at least one of them"),
        (NumberSeries("length", [1.0, math.inf]), "length is infinite"),
        (NumberSeries("depth", [1.0]), "has no column 'depth'"),
    ],
)
def test_what_cannot_be_read_is_refused(numbers: Numbers, raw: object, sentence: str) -> None:
    for method in (numbers.source, numbers.target):
        with pytest.raises(DataError, match=sentence):
            method(raw)


def test_extreme_values_stay_finite(numbers: Numbers) -> None:
    arrays = numbers.source({"body_mass": 1e300, "length": -1e300}).arrays
    assert arrays["values"].tolist() == [LIMIT, -LIMIT]


def test_a_name_carries_its_words(numbers: Numbers) -> None:
    ids = numbers.source({"body_mass": 1.0, "length": 1.0}).arrays["name_ids"]
    assert ids.shape == (2, 8) and (ids[:, 0] >= 0).all() and (ids[0] != ids[1]).any()
    words = [token for token in ids[0].tolist() if token >= 0]
    assert numbers.text.decode(words) == " body mass"
