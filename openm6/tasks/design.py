"""Tasks of design: sketch, colour in, restyle after a reference, mix two styles, change the background."""

from __future__ import annotations

from openm6.tasks.design_slots import BackgroundName, Mixed, OnBackground, Outline, Reference, Restyled
from openm6.tasks.slots import Picture, Slot, Text
from openm6.tasks.task import Task


def _draws(
    name: str, summary: str, given: dict[str, Slot], wanted: Picture, en: str, zh: str, compares: bool = False
) -> Task:
    """A task that answers with a picture."""
    return Task(
        name=name,
        summary=summary,
        given=given,
        wanted=wanted,
        compares=compares,
        prompts={"en": (en,), "zh": (zh,)},
        metrics=("code_bits",),
        baseline="position_frequencies",
        reads="image" if "image" in given else "text",
        gives="image",
    )


TASKS = (
    _draws(
        "sketch",
        "sketch what a text says in lines",
        {"text": Text("text")},
        Outline(),
        "sketch {text}",
        "画{text}的草图",
    ),
    _draws(
        "colour_sketch",
        "colour a sketch in",
        {"image": Outline(), "text": Text("text")},
        Picture(),
        "{image} Colour it in: {text}",
        "{image} 上色：{text}",
    ),
    _draws(
        "restyle",
        "redraw a picture in the style of a reference",
        {"image": Picture(), "reference": Reference()},
        Restyled(),
        "{image} in the style of {reference}",
        "{image} 按照风格 {reference}",
        compares=True,
    ),
    _draws(
        "mix_styles",
        "redraw a picture in a mixture of two styles",
        {"image": Picture(), "reference": Reference(), "second": Reference(1)},
        Mixed(),
        "{image} mixing {reference} and {second}",
        "{image} 混合 {reference} 和 {second}",
        compares=True,
    ),
    _draws(
        "change_background",
        "put another background behind what a picture shows",
        {"image": Picture(), "colour": BackgroundName()},
        OnBackground(),
        "{image} Background: {colour}",
        "{image} 背景：{colour}",
    ),
)
