"""Every scenario's example run on a model: what it answers, how long it takes, what it still has to learn."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from openm6.base.errors import OpenM6Error
from openm6.base.files import replace_text
from openm6.inference.load import LoadedModel, load
from openm6.modalities.numbers import Histogram
from openm6.serve.alone import answer_alone
from openm6.serve.scenarios.ask import scenario_request
from openm6.serve.scenarios.catalogue import Catalogue, read_catalogue, standing
from openm6.serve.scenarios.examples import example_values
from openm6.serve.scenarios.scenario import LANGUAGES, Language, Scenario

SHORT = 48  # characters of an answer in the table


@dataclass(frozen=True)
class Tried:
    """One example of one scenario: `state` is answered, untaught or failed."""

    scenario: str
    language: Language
    state: str
    answer: str
    seconds: float


def run_scenarios(
    trained: Path, json_path: Path | None = None, tell: Callable[[Tried], None] = lambda tried: None
) -> list[Tried]:
    """Runs the examples of all scenarios, in both languages, one after the other.

    Raises:
        CheckpointError: there is no model there.
    """
    found = try_all(load(trained), read_catalogue(), tell)
    if json_path is not None:
        replace_text(json_path, to_json(found))
    return found


def try_all(
    loaded: LoadedModel, catalogue: Catalogue, tell: Callable[[Tried], None] = lambda tried: None
) -> list[Tried]:
    """The examples of a catalogue on a model."""
    found = []
    for scenario in catalogue.scenarios.values():
        for language in LANGUAGES:
            found.append(try_example(loaded, scenario, language))
            tell(found[-1])
    return found


def try_example(loaded: LoadedModel, scenario: Scenario, language: Language) -> Tried:
    """One example; a scenario that the model was not taught is not run."""
    able = standing(scenario, loaded.description)
    if not able.trained:
        return Tried(scenario.name, language, "untaught", able.said(), 0.0)
    began = time.perf_counter()
    try:
        request = scenario_request(scenario, language, example_values(scenario, language))
        answer = answer_alone(loaded, request)
    except OpenM6Error as error:
        return Tried(scenario.name, language, "failed", str(error), time.perf_counter() - began)
    return Tried(scenario.name, language, "answered", said(scenario, answer), time.perf_counter() - began)


def said(scenario: Scenario, value: Any) -> str:
    """An engine's value in a few words."""
    if isinstance(value, str):
        return value
    if isinstance(value, Histogram):
        low, high = value.interval(0.8)
        return f"{value.median()[0]:.4g} [{low[0]:.4g}, {high[0]:.4g}]"
    if scenario.gives == "ranking":
        scores = [-nats / length for nats, length in value]
        return " > ".join(str(row + 1) for row in np.argsort([-score for score in scores]))
    if scenario.gives == "embedding":
        return f"{len(value)} numbers"
    return f"{scenario.gives} of {len(value)} places"


def to_json(found: list[Tried]) -> str:
    """The JSON of `openm6 evaluate --scenarios --json`: counts by state, and each example."""
    states = [tried.state for tried in found]
    counts = {state: states.count(state) for state in ("answered", "untaught", "failed")}
    return json.dumps(
        {**counts, "examples": [asdict(tried) for tried in found]}, ensure_ascii=False, indent=1
    )


def tried_table(found: list[Tried]) -> Table:
    """One row an example."""
    table = Table("scenario", "language", "state", "answer", "s", box=None)
    for tried in found:
        answer = tried.answer if len(tried.answer) <= SHORT else tried.answer[: SHORT - 1] + "…"
        table.add_row(
            tried.scenario, tried.language, tried.state, answer.replace("\n", " "), f"{tried.seconds:.2f}"
        )
    return table
