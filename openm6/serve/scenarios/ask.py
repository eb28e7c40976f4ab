"""A scenario with its inputs as a request to the engine, in the words that the model was taught."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from openm6.base.config import nearest
from openm6.base.errors import DataError
from openm6.modalities.interface import Part
from openm6.modalities.numbers import NumberSeries
from openm6.modalities.truncation import join_texts
from openm6.serve.requests import (
    CodesRequest,
    EmbedRequest,
    NumbersRequest,
    RankRequest,
    Request,
    TextRequest,
)
from openm6.serve.scenarios.scenario import Language, Scenario

Values = Mapping[str, Any]
_SLOT = re.compile(r"\{(\w+)\}")


def scenario_request(
    scenario: Scenario,
    language: Language,
    values: Values,
    *,
    client: str = "",
    seconds: float | None = None,
    seed: int = 0,
) -> Request:
    """The request of a scenario.

    values: by name of the input: str for text, bytes for image and sound, {column: value} for numbers, {name, values}
        for series, a list of texts for candidates, shares for box (4) and stretch (2)

    Raises:
        DataError: an input is missing, unknown or not of its kind.
    """
    checked = check_values(scenario, values)
    parts = scenario_parts(scenario, language, checked)
    if scenario.gives == "text":
        sampling = scenario.decoding.text.model_copy(update={"seed": seed})
        return TextRequest(parts=parts, client=client, seconds=seconds, sampling=sampling)
    if scenario.gives == "numbers":
        return _numbers(scenario, checked, parts, client, seconds)
    if scenario.gives == "ranking":
        candidates = tuple(checked[str(scenario.kind_of("candidates"))])
        return RankRequest(parts=parts, client=client, seconds=seconds, candidates=candidates)
    if scenario.gives == "embedding":
        return EmbedRequest(parts=parts, client=client, seconds=seconds)
    return _codes(scenario, checked, parts, client, seconds, seed)


def _numbers(
    scenario: Scenario, values: Values, parts: tuple[Part, ...], client: str, seconds: float | None
) -> NumbersRequest:
    series = scenario.kind_of("series")
    if series is not None:
        name = values[series]["name"]
        return NumbersRequest(parts=parts, client=client, seconds=seconds, series=name, ahead=scenario.ahead)
    return NumbersRequest(parts=parts, client=client, seconds=seconds, columns=(str(scenario.column),))


def _codes(
    scenario: Scenario,
    values: Values,
    parts: tuple[Part, ...],
    client: str,
    seconds: float | None,
    seed: int,
) -> CodesRequest:
    """A picture or sound, wholly new or filled in where the box or stretch lies."""
    hole, gap = scenario.kind_of("box"), scenario.kind_of("stretch")
    kept = scenario.kind_of("image") if hole else scenario.kind_of("sound") if gap else None
    return CodesRequest(
        parts=parts,
        client=client,
        seconds=seconds,
        want="image" if scenario.gives == "image" else "sound",
        sampling=scenario.decoding.masked.model_copy(update={"seed": seed}),
        given=values[kept] if kept else None,
        hole=tuple(values[hole]) if hole else None,
        gap=tuple(values[gap]) if gap else None,
    )


def scenario_parts(scenario: Scenario, language: Language, values: Values) -> tuple[Part, ...]:
    """The prompt with every input in its place; neighbouring texts become one."""
    parts: list[Part] = []
    for number, piece in enumerate(_SLOT.split(scenario.prompt.said(language))):
        if number % 2 == 0:
            part = Part("text", piece, {"cuttable": ()})
        elif piece == "column":
            part = Part("text", str(scenario.column).replace("_", " "), {"cuttable": ()})
        else:
            part = _part(scenario, piece, values)
        if part.modality == "text" and parts and parts[-1].modality == "text":
            parts[-1] = join_texts(parts[-1], part)
        elif part.raw != "":
            parts.append(part)
    return tuple(parts)


def _part(scenario: Scenario, name: str, values: Values) -> Part:
    kind, value = scenario.inputs[name].kind, values[name]
    if kind == "image":
        hole = scenario.kind_of("box")
        return Part("image", value, {"hole": tuple(values[hole])} if hole else {})
    if kind == "sound":
        gap = scenario.kind_of("stretch")
        return Part("sound", value, {"gap": tuple(values[gap])} if gap else {})
    if kind == "series":
        return Part("numbers", NumberSeries(value["name"], list(value["values"])))
    if kind == "numbers":
        return Part("numbers", {column: x for column, x in value.items() if column != scenario.column})
    return Part("text", value)


def check_values(scenario: Scenario, values: Values) -> dict[str, Any]:
    """The inputs, each of its kind.

    Raises:
        DataError: an input is missing, unknown or not of its kind.
    """
    for name in values:
        if name not in scenario.inputs:
            hint = nearest(name, sorted(scenario.inputs))
            raise DataError(f"scenario {scenario.name} takes no input {name!r}; {hint}")
    for name, given in scenario.inputs.items():
        if values.get(name) in (None, "", b"", {}, []):
            raise DataError(f"scenario {scenario.name} needs the input {name!r} ({given.kind}): give it")
        if not _FITS[given.kind](values[name]):
            raise DataError(f"input {name!r} of scenario {scenario.name} must be {_FORMS[given.kind]}")
    return dict(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and all(x is None or _is_number(x) for x in value.values())


def _is_series(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"name", "values"} or not isinstance(value["name"], str):
        return False
    values = value["values"]
    return isinstance(values, list) and bool(values) and all(x is None or _is_number(x) for x in values)


def _are_shares(value: Any, count: int) -> bool:
    if not isinstance(value, list | tuple) or len(value) != count or not all(map(_is_number, value)):
        return False
    half = count // 2
    return all(0 <= value[i] < value[i + half] <= 1 for i in range(half))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text for text in value)


_FITS = {
    "text": lambda value: isinstance(value, str),
    "image": lambda value: isinstance(value, bytes),
    "sound": lambda value: isinstance(value, bytes),
    "numbers": _is_row,
    "series": _is_series,
    "candidates": _are_texts,
    "box": lambda value: _are_shares(value, 4),
    "stretch": lambda value: _are_shares(value, 2),
}
_FORMS = {
    "text": "a text",
    "image": "the bytes of a picture file",
    "sound": "the bytes of a sound file",
    "numbers": "values by column, as {'mass': 3.5}",
    "series": "a name and values, as {'name': 'price', 'values': [3.5, 4]}",
    "candidates": "a list of texts",
    "box": "four shares of the sides: left, top, right, bottom",
    "stretch": "two shares of the length: start, end",
}
