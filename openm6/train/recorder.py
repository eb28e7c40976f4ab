"""From steps to lines: averages over `log_every` steps, told to every sink (file, TensorBoard, display)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

from openm6.base.files import append_line, replace_text
from openm6.base.plain_json import to_json
from openm6.base.run_folder import RunFolder
from openm6.train.step import StepReport

Line = dict[str, Any]


class Sink(Protocol):
    """Takes in what a run tells; its methods must not change the run."""

    def step(self, step: int, steps: int | None) -> None:
        """After every step."""

    def line(self, line: Line) -> None:
        """Averages over the last steps, or, where the line has the key `evaluation`, scores."""

    def close(self) -> None:
        """At the end, also after a failure."""


class Recorder:
    """Averages the reports of consecutive steps; its state is carried in checkpoints, so a resumed run tells the same.

    Skipped steps are left out of the averages.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}  # name -> [sum, count]
        self._tokens = 0
        self._seconds = 0.0

    def add(self, report: StepReport, seconds: float) -> None:
        """Take in one step, which took `seconds`."""
        self._tokens += report.tokens
        self._seconds += seconds
        if not report.applied:
            return
        named = {"loss": report.loss, "grad_norm": report.grad_norm, **report.metrics}
        named |= {f"c_v {layer}": value for layer, value in enumerate(report.c_v)}
        named |= {f"dropped {layer}": value for layer, value in enumerate(report.dropped)}
        self.add_numbers(named)

    def add_numbers(self, named: Mapping[str, float]) -> None:
        """Take in further numbers of one step."""
        for name, value in named.items():
            total = self._sums.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1

    def take(self) -> Line:
        """The averages since the last call, and the speed."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        layers = {
            kind: [means.pop(name) for name in list(means) if name.startswith(f"{kind} ")]
            for kind in ("c_v", "dropped")
        }
        if not any(layers["dropped"]):
            del layers["dropped"]  # dropless routing, by far the usual case
        speed = self._tokens / self._seconds if self._seconds > 0 else 0.0
        self._sums, self._tokens, self._seconds = {}, 0, 0.0
        return {**means, **layers, "tokens_per_second": speed}

    def state(self) -> dict[str, Any]:
        return {"sums": self._sums, "tokens": self._tokens, "seconds": self._seconds}

    def load_state(self, state: dict[str, Any]) -> None:
        # A sum that was not finite was saved as null.
        self._sums = {
            name: [math.nan if total is None else total, count]
            for name, (total, count) in state["sums"].items()
        }
        self._tokens, self._seconds = state["tokens"], state["seconds"]


class MetricsFile:
    """Appends lines to metrics.jsonl, where numbers that are not finite become null."""

    def __init__(self, run: RunFolder, step: int) -> None:
        self._path = run.metrics
        _keep_until(run, step)

    def step(self, step: int, steps: int | None) -> None:
        pass

    def line(self, line: Line) -> None:
        append_line(self._path, to_json(line))

    def close(self) -> None:
        pass


def read_metrics(run: RunFolder) -> list[Line]:
    """The lines of a run's metrics.jsonl; one that a crash cut short is left out."""
    if not run.metrics.exists():
        return []
    lines = []
    for text in run.metrics.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _keep_until(run: RunFolder, step: int) -> None:
    """Drop the lines of steps that a resumed run will take again."""
    if run.metrics.exists():
        kept = [line for line in read_metrics(run) if line.get("step", 0) <= step]
        replace_text(run.metrics, "".join(to_json(line) + "\n" for line in kept))
