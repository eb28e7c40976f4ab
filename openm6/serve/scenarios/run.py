"""`openm6 scenarios` lists them, with what a run can do; `openm6 evaluate --scenarios` runs all examples on a model."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from openm6.checkpoint.folder import latest
from openm6.core.errors import OpenM6Error
from openm6.core.files import replace_text
from openm6.inference.load import load, precision_of
from openm6.modalities.histogram import Histogram
from openm6.models.description import MODEL_FILE, read_description
from openm6.serve.config import EngineConfig
from openm6.serve.engine import Engine
from openm6.serve.scenarios.ask import example_values, scenario_request
from openm6.serve.scenarios.scenario import (
    LANGUAGES,
    Language,
    Readiness,
    Scenario,
    ScenarioLibrary,
    library_of,
    read_library,
    read_scores,
    readiness,
)

MAX_ANSWER = 48  # characters in the table
ONE_AT_A_TIME = EngineConfig(max_num_seqs=1, max_num_media=1, max_model_len=4096, batch_invariant=False)


def list_scenarios(trained: Path | None = None, language: Language = "en") -> Table:
    """Return a table with one row per scenario; for a run, which are ready. Raise CheckpointError if it is none."""
    last = "recipe" if trained is None else "state"
    table = Table("scenario", "domain", "inputs", "output", "what it does", last, box=None)
    library, found = _listed(trained)
    for scenario, able in found:
        domain = library.domains[library.domain_of[scenario.name]].title.text(language)
        takes = ", ".join(dict.fromkeys(declared.kind for declared in scenario.inputs.values()))
        state = able.text(language) if able is not None else scenario.recipe
        table.add_row(scenario.name, domain, takes, scenario.output, scenario.summary.text(language), state)
    return table


def scenarios_json(trained: Path | None = None) -> str:
    """Return every field of each scenario as JSON; with a run, also `ready`, `needs` and `state`. Raise as above."""
    library, listed = _listed(trained)
    found = []
    for scenario, able in listed:
        entry = {"domain": library.domain_of[scenario.name], **scenario.model_dump(mode="json")}
        if able is not None:
            entry |= {"ready": able.ready, "needs": list(able.missing), "state": able.text()}
        found.append(entry)
    return json.dumps({"scenarios": found}, ensure_ascii=False, indent=1)


def _listed(trained: Path | None) -> tuple[ScenarioLibrary, list[tuple[Scenario, Readiness | None]]]:
    """All scenarios, each with its readiness by the checkpoint and the report of a run if one is named."""
    if trained is None:
        library = read_library()
        return library, [(scenario, None) for scenario in library.scenarios.values()]
    path = latest(trained) / MODEL_FILE
    description, scores = read_description(path.read_text(encoding="utf-8"), str(path)), read_scores(path.parent)
    library = library_of(description)
    return library, [(scenario, readiness(scenario, description, scores)) for scenario in library.scenarios.values()]


@dataclass(frozen=True)
class ExampleResult:
    """One example of one scenario: `state` is answered, untrained or failed."""

    scenario: str
    language: Language
    state: str
    answer: str
    seconds: float


def run_scenarios(
    trained: Path, json_path: Path | None = None, device: str = "auto", dtype: str = "auto"
) -> list[ExampleResult]:
    """Run the examples of all scenarios, in both languages, and write them to `json_path`; raise CheckpointError."""
    config = ONE_AT_A_TIME.model_copy(update={"weights": precision_of(dtype) or "auto"})
    with Engine(load(trained, device), config) as engine:
        scenarios = library_of(engine.loaded.description).scenarios.values()
        pairs = product((scenario for scenario in scenarios if scenario.examples), LANGUAGES)
        results = [run_example(engine, scenario, language) for scenario, language in pairs]
    if json_path is not None:
        states = Counter(result.state for result in results)
        report: dict[str, Any] = {state: states[state] for state in ("answered", "untrained", "failed")}
        report["examples"] = [asdict(result) for result in results]
        replace_text(json_path, json.dumps(report, ensure_ascii=False, indent=1))
    return results


def run_example(engine: Engine, scenario: Scenario, language: Language) -> ExampleResult:
    """Run one example; a scenario that the model was not trained for is not run."""
    able = readiness(scenario, engine.loaded.description)
    if not able.trained:
        return ExampleResult(scenario.name, language, "untrained", able.text(), 0.0)
    began = time.perf_counter()
    try:
        request = scenario_request(scenario, language, example_values(scenario, language))
        state, answer = "answered", answer_text(scenario, engine.ask_and_wait(request).value)
    except OpenM6Error as error:
        state, answer = "failed", str(error)
    return ExampleResult(scenario.name, language, state, answer, time.perf_counter() - began)


def answer_text(scenario: Scenario, value: Any) -> str:
    """Return an answer's value in a few words."""
    if isinstance(value, str):
        return value
    if isinstance(value, Histogram):
        low, high = value.interval(0.8)
        return f"{value.median()[0]:.4g} [{low[0]:.4g}, {high[0]:.4g}]"
    if scenario.output == "ranking":
        order = np.argsort([nll / length for nll, length in value])
        return " > ".join(str(index + 1) for index in order)
    if scenario.output == "embedding":
        return f"{len(value)} numbers"
    return f"{scenario.output} of {len(value)} positions"


def results_table(results: list[ExampleResult]) -> Table:
    """Return a table with one row per example."""
    table = Table("scenario", "language", "state", "answer", "s", box=None)
    for result in results:
        answer = result.answer.replace("\n", " ")
        answer = answer if len(answer) <= MAX_ANSWER else answer[: MAX_ANSWER - 1] + "…"
        table.add_row(result.scenario, result.language, result.state, answer, f"{result.seconds:.2f}")
    return table
