"""A scenario with its inputs as a request to the engine, its examples, and all of them listed or run on a model.

Images and audio of an example name one record of the data in the package: `emoji#emoji/1FAB4`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from openm6.checkpoint.folder import latest
from openm6.core.errors import ConfigError, DataError, OpenM6Error, nearest
from openm6.core.files import replace_text
from openm6.data.parquet import EMBEDDED_MARK, EmbeddedConfig
from openm6.data.records import Record
from openm6.data.sources import Split, open_sources
from openm6.inference.load import load, precision_of
from openm6.modalities.histogram import Histogram
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries
from openm6.models.description import MODEL_FILE, CheckpointConfig, read_description
from openm6.serve.config import EngineConfig
from openm6.serve.engine import Engine
from openm6.serve.requests import CodesRequest, EmbedRequest, NumbersRequest, RankRequest, Request, TextRequest
from openm6.serve.scenarios.scenario import (
    LANGUAGES,
    PROMPTED,
    InputKind,
    Language,
    Readiness,
    Scenario,
    ScenarioLibrary,
    library_of,
    read_library,
    read_scores,
    readiness,
)
from openm6.tasks.task import fill_prompt

Values = Mapping[str, Any]
MEDIA = ("image", "audio")  # kinds of inputs, and the fields of records that hold them


def scenario_request(scenario: Scenario, language: Language, values: Values, seed: int = 0) -> Request:
    """Return the request of a scenario; raise DataError if an input is missing, unknown or not of its kind.

    values: by name of the input: str for text, bytes for image and audio, {column: value} for numbers, {name, values}
        for series, a list of texts for candidates, fractions for box (4) and span (2)
    """
    for name in values:
        if name not in scenario.inputs:
            hint = nearest(name, sorted(scenario.inputs))
            raise DataError(f"scenario {scenario.name} takes no input {name!r}; {hint}")
    for name, declared in scenario.inputs.items():
        if values.get(name) in (None, "", b"", {}, []):
            raise DataError(f"scenario {scenario.name} needs the input {name!r} ({declared.kind}): add it")
        if not _is_valid(declared.kind, values[name]):
            raise DataError(f"input {name!r} of scenario {scenario.name} must be {_FORMS[declared.kind]}")
    inputs = {name: _part(scenario, name, values) for name, given in scenario.inputs.items() if given.kind in PROMPTED}
    column = str(scenario.column)
    parts = tuple(fill_prompt(scenario.prompt.text(language), inputs, {"column": column.replace("_", " ")}))
    if scenario.output == "text":
        return TextRequest(parts=parts, sampling=scenario.decoding.text.model_copy(update={"seed": seed}))
    if scenario.output == "numbers":
        series = scenario.kind_of("series")
        if series is not None:
            return NumbersRequest(parts=parts, series=_series(values[series]), ahead=scenario.ahead)
        return NumbersRequest(parts=parts, columns=(column,))
    if scenario.output == "ranking":
        return RankRequest(parts=parts, candidates=tuple(values[str(scenario.kind_of("candidates"))]))
    if scenario.output == "embedding":
        return EmbedRequest(parts=parts)
    box, span = scenario.kind_of("box"), scenario.kind_of("span")
    source = scenario.kind_of("image") if box else scenario.kind_of("audio") if span else None
    return CodesRequest(
        parts=parts,
        modality="image" if scenario.output == "image" else "audio",
        sampling=scenario.decoding.masked.model_copy(update={"seed": seed}),
        source=values[source] if source else None,
        mask=tuple(values[box]) if box else None,
        span=tuple(values[span]) if span else None,
    )


def _part(scenario: Scenario, name: str, values: Values) -> Part:
    kind, value = scenario.inputs[name].kind, values[name]
    if kind == "image":
        box = scenario.kind_of("box")
        return Part("image", value, {"mask_box": tuple(values[box])} if box else {})
    if kind == "audio":
        span = scenario.kind_of("span")
        return Part("audio", value, {"mask_span": tuple(values[span])} if span else {})
    if kind == "series":
        return Part("numbers", _series(value))
    if kind == "numbers":
        return Part("numbers", {column: x for column, x in value.items() if column != scenario.column})
    return Part("text", value)


def _series(value: Mapping[str, Any]) -> NumberSeries:
    return NumberSeries(value["name"], list(value["values"]))


def _is_valid(kind: InputKind, value: Any) -> bool:
    match kind, value:
        case ("text", str()) | ("image" | "audio", bytes()):
            return True
        case "numbers", dict():
            return _are_numbers(x for x in value.values() if not isinstance(x, str))  # dates as text
        case "series", {"name": str(), "values": [_, *_] as values, **others}:
            return not others and _are_numbers(values)
        case "candidates", list():
            return all(isinstance(text, str) and text for text in value)
        case "box", [left, top, right, bottom]:
            return _is_interval(left, right) and _is_interval(top, bottom)
        case "span", [start, end]:
            return _is_interval(start, end)
    return False


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(x is None or (isinstance(x, int | float) and not isinstance(x, bool)) for x in values)


def _is_interval(low: Any, high: Any) -> bool:
    return None not in (low, high) and _are_numbers((low, high)) and 0 <= low < high <= 1


_FORMS = {
    "text": "a text",
    "image": "the bytes of an image file",
    "audio": "the bytes of an audio file",
    "numbers": "values by column, as {'mass': 3.5}",
    "series": "a name and values, as {'name': 'price', 'values': [3.5, 4]}",
    "candidates": "a list of texts",
    "box": "four fractions of the sides: left, top, right, bottom",
    "span": "two fractions of the length: start, end",
}


@cache
def example_record(name: str) -> Record:
    """Return the record that `data#id` names, from the embedded data; raise ConfigError if there is none."""
    data, _, key = name.partition("#")
    splits: tuple[Split, ...] = ("test", "train")
    for split in splits:
        source = open_sources({data: EmbeddedConfig(name=data)}, split)[data]
        ids = source.values("id")
        if key in ids:
            return source[ids.index(key)]
    raise ConfigError(f"no record is called {name!r}: name one as emoji#emoji/1FAB4")


def example_values(scenario: Scenario, language: Language) -> dict[str, Any]:
    """Return the inputs of a scenario's example, images and audio as bytes of a file."""
    values = dict(scenario.examples[language])
    for name, declared in scenario.inputs.items():
        if declared.kind in MEDIA:
            values[name] = example_record(values[name])[declared.kind]
    return values


def example_fits(scenario: Scenario, language: Language, description: CheckpointConfig) -> bool:
    """Whether a model was trained on such inputs as the example holds: its columns, and data of the package.

    A checkpoint that does not name its sources passes; a scenario without examples does not.
    """
    if not scenario.examples:
        return False
    tasks = description.trained_tasks
    known = _package_data(description, {trained_task.source for trained_task in tasks})
    used = {trained_task.source for trained_task in tasks if trained_task.task in scenario.tasks}
    for name, value in scenario.examples[language].items():
        kind = scenario.inputs[name].kind
        columns = value if kind == "numbers" else [value["name"]] if kind == "series" else ()
        if not set(columns) <= set(description.scales):
            return False
        if description.sources and kind in MEDIA and value.partition("#")[0] not in known:
            return False
    return not description.sources or bool(_package_data(description, used))


def _package_data(description: CheckpointConfig, names: Iterable[str]) -> set[str]:
    """Names of the embedded data behind some sources, also if one refers to another."""
    found: set[str] = set()
    for name in names:
        source = description.sources.get(name, {})
        if source.get("kind") == "embedded":
            found.add(source["name"])
        words = [value for key, value in source.items() if isinstance(value, str) and key != "name"]
        found |= {word.removeprefix(EMBEDDED_MARK) for word in words if word.startswith(EMBEDDED_MARK)}
        others = [word for word in words if word in description.sources and word != name]
        found |= _package_data(description, others)
    return found


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
    found = [
        {"domain": library.domain_of[scenario.name], **scenario.model_dump(mode="json")}
        | ({} if able is None else {"ready": able.ready, "needs": list(able.missing), "state": able.text()})
        for scenario, able in listed
    ]
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
