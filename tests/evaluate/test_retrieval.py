"""Recall and its chance on galleries small enough to be counted by hand, and a model judged by them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from openm6.evaluate.answers import build_examples
from openm6.evaluate.evaluator import Search, both_directions, evaluate_retrieval
from openm6.models.description import TrainedTask
from openm6.tasks.registry import TASKS
from tests.data.lists import ListSource
from tests.small_model import demo_sources, embedding_model

SIMILAR = np.asarray([[0.9, 0.1, 0.5], [0.8, 0.7, 0.6]])
RIGHT = np.asarray([[True, False, False], [False, False, True]])


def test_recall_counts_queries_with_something_right_on_top() -> None:
    search = Search("x", SIMILAR, RIGHT)
    assert [search.hits(k).mean() for k in (1, 2, 3)] == [0.5, 0.5, 1.0]
    assert search.recalls()["recall_at_1"] == 0.5 and search.recalls()["chance_at_5"] == 1.0


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_chance_is_the_mean_over_all_orders(rank: int) -> None:
    right = np.asarray([[True, False, True, False], [False, False, False, True]])
    orders = list(itertools.permutations(range(4)))
    hits = np.mean([right[:, list(order[:rank])].any(1).mean() for order in orders])
    assert Search("x", np.zeros((2, 4)), right).chance_hits(rank).mean() == pytest.approx(hits)


def test_bits_are_none_by_chance_and_log_of_the_size_at_best() -> None:
    right = np.eye(8, dtype=bool)
    assert Search("x", np.zeros((8, 8)), right).bits(10.0) == pytest.approx(np.zeros(8))
    assert Search("x", right.astype(float), right).bits(1000.0) == pytest.approx(np.full(8, 3.0))


def test_equal_texts_are_one_query() -> None:
    loaded, task = embedding_model(), TASKS["image_text_retrieval"]
    examples, _, _ = build_examples(task, demo_sources("test")["digits"], 40, (0, task.name), lambda one: one, "zh")
    forward, backward = both_directions(loaded, task, examples, "zh")
    assert forward.similarity.shape == (len({example.key for example in examples}), 40)
    assert backward.similarity.shape == forward.similarity.shape[::-1]
    assert set(forward.blocks) == set(backward.blocks) and len(set(forward.blocks)) == len(forward.blocks)
    assert (forward.matches.sum(0) == 1).all() and (forward.name, backward.name) == (
        "text_to_image_zh",
        "image_to_text_zh",
    )


def test_a_lesson_is_judged_both_ways_in_both_languages() -> None:
    loaded = embedding_model()
    trained_task = TrainedTask(task="audio_text_retrieval", source="spoken")
    result = evaluate_retrieval(loaded, trained_task, demo_sources("test")["spoken"], 0)
    assert result is not None and result.metric == "recall_at_1" and result.baseline == pytest.approx(0.1)
    directions = {name.removesuffix("_recall_at_1") for name in result.metrics if name.endswith("_recall_at_1")}
    assert directions == {f"{x}_{y}" for x in ("text_to_audio", "audio_to_text") for y in ("en", "zh")}
    assert np.isfinite(list(result.metrics.values())).all()
    low, high = result.value_interval
    assert low <= result.value <= high and result.records == len(demo_sources("test")["spoken"])


def test_a_broken_text_is_left_out() -> None:
    spoken = demo_sources("test")["spoken"]
    records = [dict(spoken[index]) for index in range(8)]
    records[3] |= {"text_en": "half \ud83d", "text_zh": "half \ud83d"}
    trained_task = TrainedTask(task="audio_text_retrieval", source="spoken")
    result = evaluate_retrieval(embedding_model(), trained_task, ListSource("spoken", records), 0)
    assert result is not None and result.records == 7


def test_a_source_that_fits_nothing_is_not_judged() -> None:
    trained_task = TrainedTask(task="audio_text_retrieval", source="iris")
    assert evaluate_retrieval(embedding_model(), trained_task, demo_sources("test")["iris"], 0) is None


def test_a_model_that_is_always_right_is_so_in_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are fewer than images, and both directions count alike."""
    monkeypatch.setattr(Search, "hits", lambda self, k: np.ones(len(self.matches)))
    monkeypatch.setattr(Search, "bits", lambda self, scale: np.full(len(self.matches), 2.0))
    trained_task = TrainedTask(task="image_text_retrieval", source="digits")
    result = evaluate_retrieval(embedding_model(), trained_task, demo_sources("test")["digits"], 0)
    assert result is not None and result.value_interval == (1.0, 1.0)
    assert result.information_gain == pytest.approx(2) and result.information_interval == pytest.approx((2, 2))
