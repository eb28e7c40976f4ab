"""The input slots of the page: a fixed few of each kind, shown, named and filled as a scenario wants them."""

from __future__ import annotations

import io
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio
import soundfile
from PIL import Image as Pillow

from openm6.base.errors import DataError
from openm6.serve.config import Limits
from openm6.serve.errors import BadRequestError
from openm6.serve.media import check_picture, check_sound
from openm6.serve.playground.words import BAD_PICTURE, BAD_SOUND, HINTS
from openm6.serve.playground.written import read_written, written
from openm6.serve.scenarios.examples import example_values
from openm6.serve.scenarios.scenario import Language, Scenario

TEXTS, PICTURES, SOUNDS = 4, 3, 1  # the most that any scenario takes
Update = dict[str, Any]


def _path_of(_: gradio.Image, payload: Any) -> str | None:
    """A picture's file as it is: what cannot be read is said in our words, not in Gradio's."""
    return None if payload is None else payload.path


# A class, since Gradio makes a component anew where its label changes, and would forget a method of the object's own.
# Not by a class statement, at which it would write a stub file beside this one.
PictureInput: Any = ABCMeta.__new__(
    type(gradio.Image),
    "PictureInput",
    (gradio.Image,),
    {"is_template": True, "preprocess": _path_of, "__module__": __name__},
)


def picture_input(elem_id: str, label: str | None = None, visible: bool = True) -> gradio.Image:
    """A picture whose file is handed on unread."""
    found = PictureInput(
        type="filepath", format="png", height=200, elem_id=elem_id, label=label, visible=visible
    )
    assert isinstance(found, gradio.Image)
    return found


def uploaded(kind: str, path: str, limits: Limits, language: Language) -> bytes:
    """The bytes of a picture or sound that was uploaded or recorded.

    Raises:
        DataError: it cannot be read, or is too large, in the language of the page.
    """
    data = Path(path).read_bytes()
    try:
        if kind == "image":
            return check_picture(data, limits.pixels, kind)
        return check_sound(data, limits.sound_seconds, kind)
    except BadRequestError:
        said, most = (BAD_PICTURE, limits.pixels) if kind == "image" else (BAD_SOUND, limits.sound_seconds)
        raise DataError(said.said(language).format(most=most)) from None


def make_slots() -> list[gradio.components.Component]:
    """All slots, hidden: text boxes, pictures, sounds."""
    texts = [gradio.Textbox(visible=False, lines=2, elem_id=f"text-{number}") for number in range(TEXTS)]
    with gradio.Row():
        pictures = [picture_input(f"picture-{number}", visible=False) for number in range(PICTURES)]
    sounds = [
        gradio.Audio(visible=False, type="filepath", elem_id=f"sound-{number}") for number in range(SOUNDS)
    ]
    return [*texts, *pictures, *sounds]


def slot_names(scenario: Scenario) -> list[str | None]:
    """Which input each slot holds."""
    kinds = {"image": PICTURES, "sound": SOUNDS}
    names: list[str | None] = []
    for kind, count in (("text", TEXTS), *kinds.items()):
        found = [
            name
            for name, given in scenario.inputs.items()
            if kind == (given.kind if given.kind in kinds else "text")
        ]
        if len(found) > count:
            raise DataError(
                f"scenario {scenario.name} takes {len(found)} inputs of kind {kind}: {count} can be shown"
            )
        names += [*found, *[None] * (count - len(found))]
    return names


def slot_updates(scenario: Scenario, language: Language, filled: bool = True) -> list[Update]:
    """Each slot as the scenario wants it, filled with its example or empty."""
    example = example_values(scenario, language) if filled else {}
    updates = []
    for name in slot_names(scenario):
        if name is None:
            updates.append(gradio.update(visible=False))
            continue
        given = scenario.inputs[name]
        hint = HINTS[given.kind].said(language) if given.kind in HINTS else ""
        label = f"{given.said(language)} ({hint})" if hint else given.said(language)
        value = _as_shown(given.kind, example[name]) if filled else None
        updates.append(gradio.update(visible=True, label=label, value=value))
    return updates


def _as_shown(kind: Any, value: Any) -> Any:
    if kind == "image":
        return Pillow.open(io.BytesIO(value)).convert("RGBA")
    if kind == "sound":
        samples, rate = soundfile.read(io.BytesIO(value), dtype="int16")
        return rate, samples
    return written(kind, value)


def values_in(
    scenario: Scenario, slots: tuple[Any, ...], limits: Limits, language: Language = "en"
) -> dict[str, Any]:
    """What lies in the slots, by name, as `scenario_request` takes it.

    Raises:
        DataError: something cannot be read.
    """
    found = {}
    for name, value in zip(slot_names(scenario), slots, strict=True):
        if name is not None and value not in (None, ""):
            kind = scenario.inputs[name].kind
            is_file = kind in ("image", "sound")
            found[name] = uploaded(kind, value, limits, language) if is_file else read_written(kind, value)
    return found
