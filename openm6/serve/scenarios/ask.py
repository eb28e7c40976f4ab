"""A scenario with its inputs as a request to the engine, and the examples that scenarios come with.

Images and audio of an example name one record of the data in the package: `emoji#emoji/1FAB4`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from openm6.core.errors import ConfigError, DataError, nearest
from openm6.data.parquet import EMBEDDED_MARK, EmbeddedConfig
from openm6.data.records import Record
from openm6.data.sources import Split, open_sources
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries
from openm6.models.description import CheckpointConfig
from openm6.serve.requests import CodesRequest, EmbedRequest, NumbersRequest, RankRequest, Request, TextRequest
from openm6.serve.scenarios.scenario import PROMPTED, InputKind, Language, Scenario
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
            return _are_numbers(value.values())
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
