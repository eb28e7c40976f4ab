"""Numbers: what may be missing, what is refused, and the loss against direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openm6.core.errors import DataError
from openm6.modalities.histogram import BINS, LIMIT, one_hot_bins
from openm6.modalities.interface import Part
from openm6.modalities.numbers import Numbers, NumbersIn, NumbersOut
from openm6.modalities.series import NumberSeries, fit_scale
from openm6.modalities.simple_predictors import FOLDS, TEXT
from openm6.modalities.text import Text, train_tokenizer
from openm6.train.simple_predictors import fit_table

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
    arrays = as_tensors(numbers.target({"length": 41.0, "body_mass": None}).arrays)
    t = as_tensors(numbers.source({"length": 41.0}).arrays)["values"]
    nll = adapter.nll(hidden, arrays)
    log_probability, location = adapter.distribution(hidden, arrays)
    # Without simple predictions, over the scaled and squashed value itself.
    assert float(nll[0]) == pytest.approx(-float(log_probability[0, one_hot_bins(t).argmax()]), rel=1e-5)
    assert float(nll[1]) == 0 and not location.any()


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"length": math.inf}, "length is infinite"),
        ({"length": -math.inf}, "length is infinite"),
        ({"length": 10**400}, "length is infinite"),
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


def test_dates_are_read_as_their_parts() -> None:
    scales = dict.fromkeys(("length", "day year", "day month", "day weekday", "day hour"), (0.0, 1.0))
    numbers = Numbers(Text(train_tokenizer(["day month"], 300)), scales, {})
    numbers.dates = {"day": "%d.%m.%Y"}
    read = numbers.source({"length": 2.0, "day": "31.01.2024"}).arrays
    parts = numbers.source({"length": 2.0, "day year": 2024 + 30 / 365.25, "day month": 1.0, "day weekday": 3.0}).arrays
    assert all(np.array_equal(read[name], parts[name]) for name in parts)
    assert numbers.source({"day": None}).arrays["observed"].tolist() == [False] * 3
    given = numbers.given([Part("numbers", {"length": 2.0, "day": "31.01.2024"})])
    assert (given["day month"], "day" in given) == (1.0, False)
    with pytest.raises(DataError, match=r"column 'day' holds '2024-01-31', which does not fit its format"):
        numbers.source({"day": "2024-01-31"})


def test_an_hour_that_no_date_of_the_training_had_is_left_out() -> None:
    scales = dict.fromkeys(("day year", "day month", "day weekday"), (0.0, 1.0))
    numbers = Numbers(Text(train_tokenizer(["day"], 300)), scales, {})
    numbers.dates = {"day": None}
    with_hour, without = ({"day": f"2024-01-31{clock}"} for clock in ("T13:30", ""))
    assert np.array_equal(numbers.source(with_hour).arrays["values"], numbers.source(without).arrays["values"])
    assert numbers.given([Part("numbers", with_hour)]) == numbers.given([Part("numbers", without)])


def test_extreme_values_stay_finite(numbers: Numbers) -> None:
    arrays = numbers.source({"body_mass": 1e300, "length": -1e300}).arrays
    assert arrays["values"].tolist() == [LIMIT, -LIMIT]


@pytest.mark.parametrize("value", [1e45, 1e200, -1e308])
def test_a_series_beyond_all_scales_is_refused(numbers: Numbers, value: float) -> None:
    series = NumberSeries("length", [1.0, value, 2.0])
    with pytest.raises(DataError, match="length holds a value beyond 1e\\+30"):
        numbers.source(series)


def test_long_texts_are_not_kept_by_the_cache(numbers: Numbers) -> None:
    kept = len(numbers._cache.entries)
    assert (
        numbers.source({"length": f"{' ' * 1000}2.5"}).arrays["values"].tolist()
        == numbers.source({"length": 2.5}).arrays["values"].tolist()
    )
    assert len(numbers._cache.entries) == kept + 1


def test_a_name_carries_its_words(numbers: Numbers) -> None:
    ids = numbers.source({"body_mass": 1.0, "length": 1.0}).arrays["name_ids"]
    assert ids.shape == (2, 8) and (ids[:, 0] >= 0).all() and (ids[0] != ids[1]).any()
    words = [token for token in ids[0].tolist() if token >= 0]
    assert numbers.text.decode(words) == " body mass"


def test_simple_predictors_move_the_distribution_and_likelihoods_stay_comparable() -> None:
    rng = np.random.default_rng(0)
    rows = [{"length": float(x), "body_mass": float(2.5 * x * x), "sex": "male"} for x in rng.uniform(30, 50, 80)]
    table = fit_table(rows, np.arange(80) % FOLDS, 0)
    assert table is not None
    known = Numbers(Text(train_tokenizer(["body mass", "length"], 300)), SCALES, {}, [table])
    given = {"length": 40.0, "sex": "male"}
    arrays = as_tensors(known.target({"body_mass": 4000.0}, options={"given": given, "fold": 1}).arrays)
    torch.manual_seed(0)
    adapter = NumbersOut(16)
    hidden = torch.randn(1, 16)
    adapter.training_loss(hidden + adapter.embed(arrays), arrays).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    adapter.requires_grad_(False)
    (found,) = adapter.histograms(hidden[None], arrays)
    assert found.median()[0] == pytest.approx(4000, rel=0.02)
    # nll is that of the scaled and squashed value, in units of a bin: its density sums to one.
    x = np.linspace(*(found.quantile(fraction)[0] for fraction in (0.01, 0.99)), 2001)
    targets = [known.target({"body_mass": float(one)}, options={"given": given, "fold": 1}).arrays for one in x]
    joined = as_tensors({name: np.concatenate([one[name] for one in targets]) for name in targets[0]})
    density = (-adapter.nll(hidden.expand(len(x), -1), joined)).exp().numpy()
    t = np.arcsinh((x - 4000.0) / 800.0)
    assert np.trapezoid(density, t) / (2 * LIMIT / BINS) == pytest.approx(0.98, abs=0.01)
    assert not as_tensors(known.target({"body_mass": 1.0}, options={"given": given, "mask_context": True}).arrays)[
        "forecasts"
    ].any()
    for other in ({}, {"elsewhere": 3.0}, {"body_mass": 5.0}):
        assert not known.target({"body_mass": 1.0}, options={"given": other}).arrays["forecasts"].any()


def test_whole_numbers_beyond_those_of_float32_survive() -> None:
    """Identifiers and populations: 2^40 and the next numbers are one in float32, whose next is 2^40 + 2^17."""
    base, rows = 2**40, [{"length": float(x), "id": float(2**40 + round(2.5 * x * x))} for x in range(30, 110)]
    scale = fit_scale(np.asarray([row["id"] for row in rows]))
    table = fit_table(rows, np.arange(80) % FOLDS, 0)
    assert table is not None and base < scale[0] < base + 30_000 and scale[1] < 20_000
    text, scales = Text(train_tokenizer(["id", "length"], 300)), {"id": scale, "length": (70.0, 20.0)}
    plain, known = Numbers(text, scales, {}), Numbers(text, scales, {}, [table])
    read = plain.source({"id": base + 9_000}).arrays["values"] - plain.source({"id": base + 8_000}).arrays["values"]
    assert 1_000 / scale[1] / 3 < read[0] < 1_000 / scale[1]
    torch.manual_seed(0)
    adapter, hidden = NumbersOut(16).requires_grad_(False), torch.randn(1, 1, 16)
    arrays = as_tensors(known.target({"id": base}, options={"given": {"length": 40.0}, "fold": 1}).arrays)
    (found,) = adapter.histograms(hidden, arrays)
    assert found.median()[0] - base == pytest.approx(4000, abs=400)
    (found,) = adapter.histograms(hidden, as_tensors(plain.target({"id": base}).arrays))
    assert 0 < np.diff(np.concatenate([found.quantile(x) for x in (0.4, 0.5, 0.6)])).max() < 2**15


def test_a_question_shows_columns_as_numbers_and_in_words() -> None:
    table = fit_table([{"a": float(n % 9), "b": float(n % 7), "cut_kind": ("Ideal", "Very Good")[n % 2]}
                       for n in range(60)], np.arange(60) % FOLDS, 0)  # fmt: skip
    assert table is not None
    known = Numbers(Text(train_tokenizer(["a"], 300)), {"a": (0.0, 1.0)}, {}, [table])
    parts = [Part("numbers", {"b": 2.0}), Part("text", "cut kind: Very Good What is its a?")]
    text = parts[1].raw
    assert known.given(parts) == {"b": 2.0, "cut_kind": "Very Good", TEXT: f" {text}"}
    assert known.given([Part("text", "the cut kind: Very Goodish")]).keys() == {TEXT}
    assert known.given([parts[0], Part("text", " What is its a?", {"cuttable": ()})]).keys() == {"b"}


def test_a_column_is_predicted_by_the_table_of_its_own_source() -> None:
    rows = [{"price": factor * (n % 9), "weight": float(n % 9)} for factor in (1.0, 100.0) for n in range(60)]
    tables = [fit_table(rows[start : start + 60], np.arange(60) % FOLDS, 0) for start in (0, 60)]
    for name, table in zip(("euros", "yen"), tables, strict=True):
        assert table is not None
        table.sources = [name]
    known = Numbers(Text(train_tokenizer(["a"], 300)), {"price": (4.0, 2.0), "weight": (4.0, 2.0)}, {}, tables)  # type: ignore[arg-type]
    middle = [
        known.target({"price": 4.0}, options={"given": {"weight": 8.0}, "source": name}).arrays["units"][0, 0]
        for name in ("euros", "yen", "pairs of both")
    ]
    assert middle[1] > 20 * middle[0] > 0
    assert middle[2] == 4.0, "what was fitted to rows of these pairs is none of theirs"


def test_probabilities_of_labels_are_those_of_the_model_and_of_simple_predictors() -> None:
    words = ("cold", "warm")
    rows = [{"t": float(n % 60 - 30), TEXT: f"day {n}"} for n in range(120)]
    labels = [{"weather": words[row["t"] > 0]} for row in rows]
    table = fit_table(rows, np.arange(120) % FOLDS, 0, labels)
    assert table is not None and table.labels["weather"].classes == ["cold", "warm"]
    known = Numbers(Text(train_tokenizer(["a"], 300)), {"t": (0.0, 1.0)}, {}, [table])
    unsure, prompt = np.asarray([[3.0, 3.0]]), [Part("numbers", {"t": 25.0}), Part("text", "What is its weather?")]
    asked = {"column": "weather", "given": {"t": 25.0}}
    scores = known.label_scores(unsure, words, [asked])
    np.testing.assert_allclose(np.exp(scores).sum(), 1)
    assert scores[0, 1] > math.log(0.8)
    np.testing.assert_allclose(known.label_scores(unsure, words[::-1], [asked]), scores[:, ::-1])
    (cold, first), (warm, second) = known.ranking([3.0, 3.5], words, [2, 4], prompt)
    assert warm < cold and first == second == 1
    key = known.label_predictions(asked)
    assert key is not None and key.key.startswith("label 1 weather ")
    other_table = fit_table([{"t": row["t"], "u": 1 - row["t"]} for row in rows], np.arange(120) % FOLDS, 0)
    assert other_table is not None
    # Weights of a start count when other tables come before its own.
    known.predictors = [other_table, *known.predictors]
    assert known.label_predictions(asked).key == key.key  # type: ignore[union-attr]
    known.widths = {key.key: {"model": 1.0, "columns": 0.0, "text": 0.0, "image": 0.0, "trees": 0.0}}
    np.testing.assert_allclose(known.label_scores(unsure, words, [asked]), np.log([[0.5, 0.5]]))
    for other in ({"column": "weather"}, {"column": "mood", "given": {"t": 1.0}}, {"given": {"t": 1.0}}, {}):
        assert known.label_predictions(other) is None
    assert known.label_predictions(asked, ("cold", "mild")) is None
    # A class that was too rare for the predictors does not switch them off.
    known.widths = {}
    rare = known.label_scores(np.full((1, 3), 3.0), ("cold", "rare", "warm"), [asked])[0]
    assert rare[2] > math.log(0.8) and rare[1] < rare[0]
    assert known.ranking([3.0, 3.5], ("cold", "mild"), [2, 4], prompt) == [(3.0, 2), (3.5, 4)]
