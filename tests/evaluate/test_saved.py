"""An evaluation kept until its report is written, and read again as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from openm6.core.run_folder import RunFolder
from openm6.evaluate.report import report_html, report_json
from openm6.evaluate.results import FILE, EvalReport, drop_evaluation, load_evaluation, save_evaluation
from openm6.modalities.histogram import Histogram
from openm6.modalities.interface import Cuttable, Part
from tests.evaluate import example_report as example


def test_the_report_is_the_same_from_what_was_kept(tmp_path: Path) -> None:
    """Texts, images, audio, numbers and missing values: all that a report shows."""
    run = example.run_folder(tmp_path)
    unknown = dataclasses.replace(example.results()[0], task="other", baseline=float("nan"))
    cut = Part("text", "a beginning", {"cuttable": (Cuttable(0, 11, keep_end=True),)})
    continued = dataclasses.replace(unknown, samples=[example.sample([cut], "end", "end")])
    row = Part("numbers", {"type": 3.0, "price": None})
    tagged = dataclasses.replace(unknown, samples=[example.sample([row], example.histogram(), {"type": 10.0})])
    results = [*example.results(), tagged, continued]
    report = dataclasses.replace(example.eval_report(), results=results, checkpoint="runs/x/step-9")
    save_evaluation(run, report, 12.5)
    found = load_evaluation(run, "runs/x/step-9")
    assert found is not None and found[1] == 12.5
    (kept,) = found[0].results[-1].samples
    assert kept.answer == "end" and kept.inputs[0].raw == "a beginning"
    assert report_html(run, found[0], example.facts()) == report_html(run, report, example.facts())
    assert report_json(found[0], example.facts()) == report_json(report, example.facts())
    drop_evaluation(run)
    assert load_evaluation(run, "runs/x/step-9") is None


def test_distributions_in_logarithms_keep_their_bound(tmp_path: Path) -> None:
    scale, run = np.array([[5.0, 1.0]]), RunFolder.open(tmp_path)
    answer = Histogram(example.histogram().probability, scale, log=True, most=np.array([6.0]))
    result = dataclasses.replace(example.results()[0], samples=[example.sample([], answer, {"a": 1.0})])
    save_evaluation(run, EvalReport([result], 1.0, "step-1"), 0.0)
    found = load_evaluation(run, "step-1")
    assert found is not None and answer.quantile(0.99)[0] == np.exp(6.0)
    kept = found[0].results[0].samples[0].answer
    assert isinstance(kept, Histogram) and kept.quantile(0.99) == answer.quantile(0.99)


def test_what_was_kept_of_another_checkpoint_does_not_count(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    save_evaluation(run, dataclasses.replace(example.eval_report(), checkpoint="step-1"), 0.0)
    assert load_evaluation(run, "step-2") is None and load_evaluation(run, "step-1") is not None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"report": {"type": "os.system"}, "joules": 1}'])
def test_a_damaged_file_means_evaluating_again(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content, encoding="utf-8")
    assert load_evaluation(RunFolder.open(tmp_path), "step-1") is None
