"""What a run's own report says of its tasks: whether a trained task is better than its baseline."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openm6.evaluate.metrics import metric_title, score

REPORT = "report.json"


@dataclass(frozen=True)
class Score:
    """The first metric of a task over one source, and that of its baseline."""

    metric: str
    value: float
    baseline: float
    better: bool

    def said(self) -> tuple[str, str]:
        """Score and baseline for a person, the metric named."""
        return f"{score(self.metric, self.value)} {metric_title(self.metric)}", score(
            self.metric, self.baseline
        )


Scores = dict[str, list[Score]]  # by task; none for a task that was not evaluated


def read_scores(checkpoint: Path) -> Scores:
    """The scores in the report of the run to which a checkpoint belongs; empty where there is no such report."""
    path = checkpoint.parent.parent / REPORT
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["tasks"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    found: Scores = defaultdict(list)
    for name, entry in entries:
        one = _score(entry)
        if one is not None:
            found[name.partition("/")[0]].append(one)
    return dict(found)


def _score(entry: Any) -> Score | None:
    """None where the entry says too little to judge by; older reports do not say `beats_baseline`."""
    try:
        value, baseline = float(entry["value"]), float(entry["baseline"])
        better = entry.get("beats_baseline")
        if better is None:
            better = value > baseline if entry["better"] == "higher" else value < baseline
        return Score(entry["metric"], value, baseline, bool(better)) if math.isfinite(value) else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
