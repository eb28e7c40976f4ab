"""`openm6 generate`: a question in options becomes one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.doors import door
from openm6.cli.show import show

Trained = Annotated[
    Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Folder of a run or of one checkpoint.")
]
Want = Annotated[str, typer.Option("--want", help="text, image, sound or numbers.")]
Text = Annotated[str | None, typer.Option("--text", help="What to say to the model.")]
Picture = Annotated[Path | None, typer.Option("--image", help="A picture to show it.")]
Recording = Annotated[Path | None, typer.Option("--sound", help="A recording to play to it.")]
Numbers = Annotated[
    str | None,
    typer.Option("--numbers", metavar="NAME=VALUE,...", help="Numbers to tell it; NAME= is missing."),
]
Series = Annotated[str | None, typer.Option("--series", metavar="NAME=V,V,...", help="A series to forecast.")]
Column = Annotated[str | None, typer.Option("--column", help="The number wanted.")]
Ahead = Annotated[int, typer.Option("--ahead", min=1, max=64, help="Steps to forecast.")]
Hole = Annotated[
    str | None,
    typer.Option("--hole", metavar="L,T,R,B", help="Box of the picture to fill in, as shares."),
]
Gap = Annotated[
    str | None,
    typer.Option("--gap", metavar="START,END", help="Stretch of the sound to fill in, as shares."),
]
Language = Annotated[str, typer.Option("--language", help="Without --text, the question is put in en or zh.")]
Decoding = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="text.temperature, text.top_p, masked.steps, masked.guidance…"
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="File for the answer.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same answer.")]

Resident = Annotated[
    int | None,
    typer.Option("--resident", min=0, help="Layers that stay on the device; the others come when used."),
]


def generate(
    trained: Trained,
    want: Want,
    text: Text = None,
    image: Picture = None,
    sound: Recording = None,
    numbers: Numbers = None,
    series: Series = None,
    column: Column = None,
    ahead: Ahead = 8,
    hole: Hole = None,
    gap: Gap = None,
    language: Language = "en",
    decoding: Decoding = None,
    out: Out = None,
    seed: Seed = 0,
    resident: Resident = None,
) -> None:
    """Ask a trained model for an answer.

    \b
    Example: openm6 generate runs/demo --text "draw the digit seven" --want image --out seven.png
    """
    question = door("question")(
        want=want,
        text=text,
        image=image,
        sound=sound,
        numbers=door("numbers")(numbers),
        series=door("series")(series),
        column=column,
        ahead=ahead,
        hole=door("shares")(hole, 4, "--hole"),
        gap=door("shares")(gap, 2, "--gap"),
        language=language,
    )
    seeds = [f"text.seed={seed}", f"masked.seed={seed}"]
    show(door("generate")(trained, question, door("decoding")([*seeds, *(decoding or [])]), out, resident))
