"""Inputs and words of the page: a component for each input of a scenario, and what was typed or uploaded there."""

from __future__ import annotations

import io
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio
import soundfile
from PIL import Image as Pillow

from openm6.core.config import build, read_yaml
from openm6.core.errors import DataError
from openm6.serve.config import Limits
from openm6.serve.content import CHECKS
from openm6.serve.errors import BadRequestError
from openm6.serve.scenarios.ask import MEDIA, example_values
from openm6.serve.scenarios.scenario import Bilingual, InputKind, Language, Scenario

_WORDS = read_yaml(Path(__file__).with_name("words.yaml"))
WORDS = {name: build(Bilingual, words, name) for name, words in _WORDS.items()}


def _path_of(_: gradio.Image, payload: Any) -> str | None:
    """The path of an image's file, unread: errors are reported in our words, not in Gradio's."""
    return None if payload is None else payload.path


# A class, since Gradio creates a component again when its label changes, and would lose a method of the object's own.
# Not by a class statement, at which it would write a stub file beside this one.
ImageInput: Any = ABCMeta.__new__(
    type(gradio.Image),
    "ImageInput",
    (gradio.Image,),
    {"is_template": True, "preprocess": _path_of, "__module__": __name__},
)


def make_inputs(scenario: Scenario, language: Language, filled: bool = True) -> list[gradio.components.Component]:
    """Return a component for each input of a scenario, with its example or empty."""
    example = example_values(scenario, language) if filled else {}
    found = []
    for name, declared in scenario.inputs.items():
        kind, label = declared.kind, declared.label.text(language)
        hint = WORDS.get(f"{kind}_hint")
        if hint is not None:
            label = f"{label} ({hint.text(language)})"
        # Without `interactive`, Gradio disables a component with a value that is made while the page is rendered.
        form: Any = {"label": label, "elem_id": f"input-{name}", "interactive": True}
        if kind == "image":
            image = Pillow.open(io.BytesIO(example[name])).convert("RGBA") if filled else None
            found.append(ImageInput(image, type="filepath", format="png", height=200, **form))
        elif kind == "audio":
            audio = soundfile.read(io.BytesIO(example[name]), dtype="int16")[::-1] if filled else None  # rate first
            found.append(gradio.Audio(audio, type="filepath", **form))
        else:
            found.append(gradio.Textbox(write_typed(kind, example[name]) if filled else None, lines=2, **form))
    return found


def values_in(
    scenario: Scenario, contents: tuple[Any, ...], limits: Limits, language: Language = "en"
) -> dict[str, Any]:
    """Return what the components of `make_inputs` hold, by name; raise DataError if something cannot be read."""
    return {
        name: uploaded(given.kind, value, limits, language) if given.kind in MEDIA else read_typed(given.kind, value)
        for (name, given), value in zip(scenario.inputs.items(), contents, strict=True)
        if value not in (None, "")
    }


def uploaded(kind: str, path: str, limits: Limits, language: Language) -> bytes:
    """Return the bytes of an upload; raise DataError, in the language of the page, if it is broken or too large."""
    data = Path(path).read_bytes()
    try:
        return CHECKS[kind](data, limits, kind)
    except BadRequestError:
        limit = limits.pixels if kind == "image" else limits.audio_seconds
        raise DataError(WORDS[f"bad_{kind}"].text(language).format(limit=limit)) from None


def read_typed(kind: InputKind, text: str) -> Any:
    """Return the value that was typed into a text box. Raise DataError if it cannot be read as this kind."""
    text = text.strip()
    if kind == "numbers":
        return dict(_column(line) for line in text.replace(";", "\n").splitlines() if line.strip())
    if kind == "series":
        name, _, values = text.replace("：", ":").rpartition(":")
        return {"name": name.strip() or "value", "values": _numbers(values)}
    if kind == "candidates":
        return [line.strip() for line in text.splitlines() if line.strip()]
    return _numbers(text) if kind in ("box", "span") else text


def _column(line: str) -> tuple[str, float | None]:
    name, equals, value = line.replace("：", "=").replace(":", "=").partition("=")
    if not equals or not name.strip():
        raise DataError(f"{line.strip()!r} must look like mass = 3.5")
    return name.strip(), _number(value)


def _numbers(text: str) -> list[float | None]:
    return [_number(word) for word in text.replace("，", ",").split(",")]


def _number(word: str) -> float | None:
    try:
        return float(word) if word.strip() else None
    except ValueError:
        raise DataError(f"{word.strip()!r} is not a number: write it as 3.5") from None


def write_typed(kind: InputKind, value: Any) -> str:
    """Return a value as it would be typed."""
    if kind == "numbers":
        return "\n".join(f"{name} = {_plain(number)}" for name, number in value.items())
    if kind == "series":
        return f"{value['name']}: {', '.join(map(_plain, value['values']))}"
    if kind == "candidates":
        return "\n".join(value)
    return ", ".join(map(_plain, value)) if kind in ("box", "span") else str(value)


def _plain(number: float | None) -> str:
    return "" if number is None else f"{number:g}"
