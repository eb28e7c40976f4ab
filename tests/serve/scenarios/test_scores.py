"""Ready means better than the baseline, by the run's own report; without a report nothing is doubted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openm6.serve.scenarios.scenario import read_catalogue, read_scores, readiness, require
from tests.small_model import loaded

CATALOGUE = read_catalogue()
CAPTION = CATALOGUE.named("caption")
KNOWS = loaded(lessons=(("describe_picture", "emoji"),)).description


def entry(value: float | None, baseline: float | None, **more: Any) -> dict[str, Any]:
    return {"metric": "exact_match", "value": value, "baseline": baseline, "better": "higher", **more}


def reported(folder: Path, tasks: Any) -> Path:
    """A checkpoint of a run with a report of these tasks."""
    (folder / "report.json").write_text(json.dumps({"tasks": tasks}), encoding="utf-8")
    return folder / "checkpoints" / "step-5"


@pytest.mark.parametrize(
    ("entries", "ready"),
    [
        ({"describe_picture/emoji": entry(0.021, 0.033)}, False),
        ({"describe_picture/emoji": entry(0.5, 0.033)}, True),
        ({"describe_picture/emoji": entry(0.5, 0.033, beats_baseline=False)}, False),  # not significant
        ({"describe_picture/emoji": entry(0.5, 0.033, beats_baseline=True)}, True),
        ({"describe_picture/a": entry(0.0, 0.1), "describe_picture/b": entry(0.5, 0.1)}, True),
        ({"draw/emoji": entry(0.021, 0.033)}, True),
        ({"describe_picture/emoji": entry(None, 0.033)}, True),
        ({"describe_picture/emoji": {}}, True),
        ({"describe_picture/emoji": "?"}, True),
        ([], True),
        ({}, True),
    ],
)
def test_ready_is_what_beats_its_baseline(entries: Any, ready: bool, tmp_path: Path) -> None:
    found = readiness(CAPTION, KNOWS, read_scores(reported(tmp_path, entries)))
    assert found.ready is ready and found.trained


def test_the_figures_are_said_in_both_languages(tmp_path: Path) -> None:
    scores = read_scores(reported(tmp_path, {"describe_picture/emoji": entry(0.021, 0.033)}))
    found = readiness(CAPTION, KNOWS, scores)
    said = found.text().replace("\u00a0", " ")
    assert said == "trained, but not better than its baseline: 2.1 % exact match against 3.3 %"
    assert "不优于基线" in found.text("zh")
    require(CAPTION, KNOWS)  # it may be asked all the same


def test_without_a_report_nothing_is_doubted(tmp_path: Path) -> None:
    assert read_scores(tmp_path / "checkpoints" / "step-5") == {}
    (tmp_path / "report.json").write_text("no JSON", encoding="utf-8")
    assert read_scores(tmp_path / "checkpoints" / "step-5") == {}
