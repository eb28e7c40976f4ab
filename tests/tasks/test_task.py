"""What follows from a task's inputs and target."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from openm6.tasks import design
from openm6.tasks.registry import SLOTS, TASKS
from openm6.tasks.slots import AUDIO, IMAGE, LABEL, NUMBERS, TEXT, Context, Derived, Slot
from openm6.tasks.task import RECALLS, Task
from tests.small_model import demo_sources

NUMERIC = ("relative_crps", "mae", "coverage_80")


@pytest.mark.parametrize(
    ("inputs", "target", "reads", "gives", "metrics", "baseline"),
    [
        ({"a": TEXT}, LABEL, "text", "text", ("exact_match",), "frequent_answer"),
        ({"a": TEXT, "b": IMAGE}, TEXT, "image", "text", ("char_bigram_f1", "exact_match"), "frequent_answer"),
        ({"a": TEXT}, IMAGE, "text", "image", ("bits_per_code", "knn_accuracy"), "position_frequencies"),
        ({"a": AUDIO, "b": IMAGE}, AUDIO, "audio", "audio", ("bits_per_code", "knn_accuracy"), "position_frequencies"),
        ({"a": NUMBERS}, SLOTS["outline"], "numbers", "image", ("bits_per_code",), "position_frequencies"),
        ({"a": TEXT, "b": NUMBERS}, SLOTS["number"], "numbers", "numbers", NUMERIC, "column_median"),
    ],
)
def test_modalities_metrics_and_baseline_follow_from_the_slots(
    inputs: dict[str, Slot], target: Slot, reads: str, gives: str, metrics: tuple[str, ...], baseline: str
) -> None:
    task = Task(summary="", inputs=inputs, target=target, prompts={"en": ("{a}",)})
    assert (task.input_modality, task.output_modality) == (reads, gives)
    assert (task.metrics, task.baseline) == (metrics, baseline)


def test_what_is_set_wins_and_contrastive_tasks_are_retrieval() -> None:
    prompts = {"en": ("{a}",)}
    task = Task(
        summary="",
        inputs={"a": Derived("numbers")},
        target=SLOTS["future"],
        prompts=prompts,
        metrics=("mae",),
        baseline="last_value",
    )
    assert (task.metrics, task.baseline) == (("mae",), "last_value")
    pair = Task(summary="", inputs={"a": TEXT}, target=IMAGE, prompts=prompts, contrastive=True)
    assert (pair.metrics, pair.baseline) == (RECALLS, "chance")


def test_each_image_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target, its truth and its input of one record share their work."""
    calls: Counter[str] = Counter()
    render = design._part

    def count(image: object) -> object:
        calls["rendered"] += 1
        return render(image)

    monkeypatch.setattr(design, "_part", count)
    record = demo_sources()["emoji"][5]
    for name, expected in (("text_to_sketch", 1), ("sketch_to_image", 1), ("style_transfer", 2), ("style_mixing", 3)):
        calls.clear()
        example = TASKS[name].example(record, np.random.default_rng(0))
        assert calls["rendered"] == expected
        assert example.answer is example.target.raw


def test_a_task_without_random_decisions_leaves_the_generator_alone() -> None:
    rng = np.random.default_rng(3)
    built = TASKS["text_to_image"].build({"text_en": "a red cup", "image": b"x"}, Context("en", rng))
    assert built.inputs["text"].raw == "a red cup" and built.target.raw == b"x"
    assert rng.random() == np.random.default_rng(3).random()
