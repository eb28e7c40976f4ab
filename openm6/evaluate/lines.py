"""The lines of a run's metrics.jsonl, as reports read them."""

from __future__ import annotations

import json
from typing import Any

from openm6.base.run_folder import RunFolder

Lines = list[dict[str, Any]]


def read_lines(run: RunFolder) -> Lines:
    """The averages a run wrote while training, scores left out; a line that a crash cut short is skipped."""
    if not run.metrics.exists():
        return []
    found = []
    with run.metrics.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int) and "evaluation" not in line:
                found.append(line)
    return found
