"""A scenario as a request to the engine, its examples, and all of them listed, run on a model or tried on a page.

Images and audio of an example name one record of the data in the package: `emoji#emoji/1FAB4`.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from openm6.checkpoint.folder import latest
from openm6.core.config import build
from openm6.core.errors import CheckpointError, ConfigError, DataError, OpenM6Error, nearest
from openm6.core.files import check_writable, replace_text
from openm6.data.parquet import EMBEDDED_MARK, EmbeddedConfig
from openm6.data.prepare import with_negatives
from openm6.data.records import Record
from openm6.data.sources import Split, open_sources
from openm6.evaluate.answers import evenly_spaced
from openm6.evaluate.report import MEDIA_BYTES, MediaBudget, report_environment, sample_data
from openm6.evaluate.results import Sample
from openm6.evaluate.run import source_configs
from openm6.hub.find import find_model
from openm6.inference.load import LoadedModel, load, precision_of, read_texts
from openm6.inference.question import is_region
from openm6.inference.sampling import MAX_TOKENS
from openm6.modalities.histogram import Histogram
from openm6.modalities.interface import Part
from openm6.modalities.registry import MODALITIES
from openm6.modalities.series import NumberSeries
from openm6.models.description import CheckpointConfig
from openm6.serve import requests
from openm6.serve.config import EngineConfig
from openm6.serve.engine import Engine
from openm6.serve.scenarios.scenario import (
    EXAMPLES_FILE,
    LANGUAGES,
    PROMPTED,
    InputKind,
    Language,
    Readiness,
    Scenario,
    ScenarioLibrary,
    Scores,
    library_of,
    read_library,
    read_scores,
    readiness,
)
from openm6.tasks.registry import all_tasks
from openm6.tasks.slots import Context
from openm6.tasks.task import fill_prompt

Values = Mapping[str, Any]
EMPTY: tuple[Any, ...] = (None, "", b"", {}, [])
MEDIA = ("image", "audio")  # kinds of inputs, and the fields of records that hold them
SEARCHED = 20  # test records of a source in which an example is looked for


def scenario_request(
    scenario: Scenario, language: Language, values: Values, seed: int = 0, max_tokens: int = MAX_TOKENS
) -> requests.Request:
    """Return the request of a scenario; raise DataError if an input is missing, unknown or not of its kind.

    max_tokens: of a text in answer, if that is less than the scenario's own
    values: by name of the input: str for text, bytes for image and audio, {column: value} for numbers, {name, values}
        for series, a list of texts for candidates, fractions for box (4) and span (2)
    """
    for name in values:
        if name not in scenario.inputs:
            hint = nearest(name, sorted(scenario.inputs))
            raise DataError(f"scenario {scenario.name} takes no input {name!r}; {hint}")
    for name, declared in scenario.inputs.items():
        if values.get(name) in EMPTY:
            if declared.optional and any(one not in EMPTY for one in values.values()):
                continue
            raise DataError(f"scenario {scenario.name} needs the input {name!r} ({declared.kind}): add it")
        if not _is_valid(declared.kind, values[name]):
            raise DataError(f"input {name!r} of scenario {scenario.name} must be {_FORMS[declared.kind]}")
    kinds = {name: given.kind for name, given in scenario.inputs.items() if values.get(name) not in EMPTY}
    inputs = {name: _part(scenario, name, values) for name, kind in kinds.items() if kind in PROMPTED}
    column = str(scenario.column)
    parts = tuple(fill_prompt(scenario.prompt.text(language), inputs, {"column": column.replace("_", " ")}))
    if scenario.output == "text":
        own = scenario.decoding.text
        changes = {"seed": seed, "max_tokens": min(own.max_tokens, max_tokens)}
        return requests.TextRequest(parts=parts, sampling=own.model_copy(update=changes))
    if scenario.output == "numbers":
        series = [part.raw for part in parts if isinstance(part.raw, NumberSeries)]
        if series:
            return requests.NumbersRequest(parts=parts, series=series[0], ahead=scenario.ahead)
        return requests.NumbersRequest(parts=parts, columns=(column,))
    if scenario.output == "ranking":
        return requests.RankRequest(parts=parts, candidates=tuple(values[str(scenario.kind_of("candidates"))]))
    if scenario.output == "embedding":
        return requests.EmbedRequest(parts=parts)
    box, span = scenario.kind_of("box"), scenario.kind_of("span")
    source = scenario.kind_of("image") if box else scenario.kind_of("audio") if span else None
    return requests.CodesRequest(
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
        return Part("numbers", NumberSeries(value["name"], list(value["values"])))
    if kind == "numbers":
        return Part("numbers", {column: x for column, x in value.items() if column != scenario.column})
    return Part("text", value)


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
        case "box" | "span", [*_]:
            return is_region(value, 2 if kind == "box" else 1) and _are_numbers(value)
    return False


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(x is None or (isinstance(x, int | float) and not isinstance(x, bool)) for x in values)


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
    config = build(EmbeddedConfig, {"name": data}, f"example {name}")
    splits: tuple[Split, ...] = ("test", "train")
    for split in splits:
        source = open_sources({data: config}, split)[data]
        ids = source.values("id")
        if key in ids:
            return source[ids.index(key)]
    raise ConfigError(f"no record is called {name!r}: name one as emoji#emoji/1FAB4")


def example_values(scenario: Scenario, language: Language, index: int = 0) -> dict[str, Any]:
    """Return the inputs of an example, the model's own if it brings some; images and audio as bytes of a file."""
    own = [one[language] for one in scenario.own_examples if language in one]
    values = dict(own[min(index, len(own) - 1)] if own else scenario.examples[language])
    for name, declared in scenario.inputs.items():
        if declared.kind in MEDIA and name in values:
            word = str(values[name])
            if "#" in word:
                # A record without such a field leaves the input empty, which the request refuses.
                values[name] = example_record(word).get(declared.kind)
                continue
            # A file beside the weights of the model, and no other.
            path, folder = Path(scenario.folder, word), scenario.folder
            if Path(word).name != word or not path.is_file():
                raise DataError(f"{EXAMPLES_FILE} names {word!r} for {scenario.name}, which is no file in {folder}")
            values[name] = path.read_bytes()
    return values


def recorded_request(scenario: Scenario, language: Language, description: CheckpointConfig) -> requests.Request | None:
    """Return the request for a test record of the model's sources, if these can be opened; else None."""
    known, rng = all_tasks(description.tasks), np.random.default_rng(0)
    for one in description.trained_tasks:
        if one.task not in scenario.tasks or one.task not in known or one.source not in description.sources:
            continue
        with suppress(OpenM6Error):
            configs, task = source_configs(description.sources, "model.json"), known[one.task]
            source = open_sources(configs, "test", [one.source])[one.source]
            for index in evenly_spaced(len(source), SEARCHED):
                record = source[index]
                if language in task.languages(record):
                    record = with_negatives(record, source, rng) if task.needs_negatives else record
                    inputs = task.build(record, Context(language, rng)).inputs
                    return scenario_request(scenario, language, _values_of(inputs, set(scenario.inputs)))
    return None


def _values_of(inputs: Mapping[str, Part], names: set[str]) -> dict[str, Any]:
    """The inputs of an example of a task as those of a scenario, which have these names."""
    found: dict[str, Any] = {name: part.raw for name, part in inputs.items() if name in names}
    series = {name: raw for name, raw in found.items() if isinstance(raw, NumberSeries)}
    found |= {name: {"name": raw.name, "values": list(raw.values)} for name, raw in series.items()}
    options = (option for part in inputs.values() for option in part.options.items())
    return found | {name: list(value) for name, value in options if name in names and value}


def example_fits(scenario: Scenario, language: Language, description: CheckpointConfig) -> bool:
    """Whether a model was trained on such inputs as the example holds: its columns, and data of the package.

    Those that it brings fit. A checkpoint that does not name its sources passes; a scenario without examples does not.
    """
    if scenario.own_examples or not scenario.examples:
        return any(language in example for example in scenario.own_examples)
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


def list_scenarios(trained: Path | str | None = None, language: Language = "en") -> Table:
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


def scenarios_json(trained: Path | str | None = None) -> str:
    """Return every field of each scenario as JSON; with a run, also `ready`, `needs` and `state`. Raise as above."""
    library, listed = _listed(trained)
    found = [
        {"domain": library.domain_of[scenario.name], **scenario.model_dump(mode="json")}
        | ({} if able is None else {"ready": able.ready, "needs": list(able.missing), "state": able.text()})
        for scenario, able in listed
    ]
    return json.dumps({"scenarios": found}, ensure_ascii=False, indent=1)


def _listed(trained: Path | str | None) -> tuple[ScenarioLibrary, list[tuple[Scenario, Readiness | None]]]:
    """All scenarios, each with its readiness by the checkpoint and the report of a run if one is named."""
    if trained is None:
        library = read_library()
        return library, [(scenario, None) for scenario in library.scenarios.values()]
    folder = latest(find_model(trained))
    (description, _), scores = read_texts(folder), read_scores(folder)
    library = library_of(description, folder)
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
    if json_path is not None:
        check_writable(json_path, "--json")
    config = ONE_AT_A_TIME.model_copy(update={"weights": precision_of(dtype) or "auto"})
    with Engine(load(trained, device), config) as engine:
        scenarios = library_of(engine.loaded.description, engine.loaded.checkpoint).scenarios.values()
        pairs = product(scenarios, LANGUAGES)
        shown = [(one, words) for one, words in pairs if any(words in x for x in (one.examples, *one.own_examples))]
        results = [run_example(engine, scenario, language) for scenario, language in shown]
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
    table = Table("scenario", "language", "state", "answer", "s", box=None)
    for result in results:
        answer = result.answer.replace("\n", " ")
        answer = answer if len(answer) <= MAX_ANSWER else answer[: MAX_ANSWER - 1] + "…"
        table.add_row(result.scenario, result.language, result.state, answer, f"{result.seconds:.2f}")
    return table


class Example(NamedTuple):
    """An example that belongs to a model; `number` counts those of a scenario in a language.

    `note`: why the scenario is not ready, if it is not.
    """

    scenario: Scenario
    language: Language
    number: int
    request: requests.Request
    note: str = ""


def examples_of(
    library: ScenarioLibrary, description: CheckpointConfig, scores: Scores, languages: Iterable[Language] = LANGUAGES,
    recorded: bool = False, weak: bool = False,
) -> Iterator[Example]:  # fmt: skip
    """Yield examples of all scenarios that are ready; with `recorded`, a test record stands in where none fits.

    With `weak`, scenarios that are trained but not ready stand in for pairs of modalities that have none.
    """
    able = {name: readiness(one, description, scores) for name, one in library.scenarios.items()}
    pairs = {(one.input_modality, one.output) for name, one in library.scenarios.items() if able[name].ready}
    for (name, scenario), language in product(library.scenarios.items(), languages):
        stands_in = weak and able[name].trained and (scenario.input_modality, scenario.output) not in pairs
        if scenario.output not in MODALITIES or not (able[name].ready or stands_in):
            continue
        note = "" if able[name].ready else able[name].text(language)
        own = sum(language in one for one in scenario.own_examples) or example_fits(scenario, language, description)
        for index in range(own):
            values = example_values(scenario, language, index)
            yield Example(scenario, language, index, scenario_request(scenario, language, values), note)
        if recorded and not own and (request := recorded_request(scenario, language, description)):
            yield Example(scenario, language, 0, request, note)


def sample_of(request: requests.Request, answer: requests.Answer, loaded: LoadedModel) -> Sample:
    """Return an answer as the report shows those to test records, without a truth."""
    value: Any = answer.value
    truth: Any = None
    if isinstance(request, requests.CodesRequest):
        value = requests.decode_codes(request, value, loaded)
    elif isinstance(request, requests.NumbersRequest):
        is_series = request.series is not None
        truth = NumberSeries(request.name, [None] * request.ahead) if is_series else {request.name: math.nan}
    return Sample(list(request.parts), value, truth, "")


def try_model(trained: Path | str, out: Path, device: str = "auto", dtype: str = "auto") -> str:
    """Answer a model's examples on one page; return the sentence to print.

    Raise CheckpointError if there is no model or nothing to try, OutputError if the page cannot be written, ConfigError
    if its folder is missing.
    """
    check_writable(out, "--out")
    folder, began = find_model(trained), time.perf_counter()
    config = ONE_AT_A_TIME.model_copy(update={"weights": precision_of(dtype) or "auto"})
    with Engine(load(folder, device), config) as engine:
        loaded, scores, media = engine.loaded, read_scores(engine.loaded.checkpoint), MediaBudget(MEDIA_BYTES)
        library = library_of(loaded.description, loaded.checkpoint)
        cells: dict[tuple[str, str], list[tuple[Example, Any]]] = {}
        others: list[tuple[Example, Any]] = []
        examples = list(examples_of(library, loaded.description, scores, recorded=True, weak=True))
        for example in track(examples, "answers", console=Console(stderr=True), transient=True):
            with suppress(OpenM6Error):
                answer = engine.ask_and_wait(example.request)
                shown = sample_data(sample_of(example.request, answer, loaded), media)
                cell = cells.setdefault((example.scenario.input_modality, example.scenario.output), [])
                # One answer in each language.
                same = [one.scenario is example.scenario and one.language != example.language for one, _ in cell]
                (cell if all(same) else others).append((example, shown))
    if not cells:
        raise CheckpointError(
            f"nothing to try with {trained}: no example fits a scenario that it is ready for, and its data are not here"
        )
    name, seconds = folder.resolve().name, time.perf_counter() - began
    data = {"name": name, "cells": cells, "others": others, "modalities": list(MODALITIES), "seconds": seconds}
    replace_text(out, report_environment().get_template("try.html").render(data) + "\n")
    return f"answers of {name} in {len(cells)} of {len(MODALITIES) ** 2} pairs of modalities: open {out}"
