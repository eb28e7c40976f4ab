"""`openm6 generate`: the options of a question become one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from openm6.cli.group import print_result
from openm6.cli.train import Trained

Box = tuple[float, float, float, float]  # left, top, right, bottom
Span = tuple[float, float]  # start, end
Output = Annotated[str, typer.Option("--output", help="text, image, audio or numbers.")]
Text = Annotated[str | None, typer.Option("--text", help="Text input.")]
Image = Annotated[Path | None, typer.Option("--image", help="Image input.")]
Recording = Annotated[Path | None, typer.Option("--audio", help="Audio input.")]
Numbers = Annotated[
    str | None,
    typer.Option("--numbers", metavar="NAME=VALUE,...", help="Numbers as input; NAME= is missing."),
]
Series = Annotated[str | None, typer.Option("--series", metavar="NAME=V,V,...", help="A series to forecast.")]
Column = Annotated[str | None, typer.Option("--column", help="The number to predict.")]
Ahead = Annotated[int, typer.Option("--ahead", min=1, max=64, help="Steps to forecast.")]
MaskBox = Annotated[
    str | None,
    typer.Option("--mask-box", metavar="L,T,R,B", help="Box of the image to fill in, as fractions."),
]
MaskSpan = Annotated[
    str | None,
    typer.Option("--mask-span", metavar="START,END", help="Span of the audio to fill in, as fractions."),
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

NumGpuLayers = Annotated[
    int | None,
    typer.Option(
        "--num-gpu-layers", min=0, help="Layers that stay on the device; the others are loaded when used."
    ),
]


def generate(
    trained: Trained,
    output: Output,
    text: Text = None,
    image: Image = None,
    audio: Recording = None,
    numbers: Numbers = None,
    series: Series = None,
    column: Column = None,
    ahead: Ahead = 8,
    mask_box: MaskBox = None,
    mask_span: MaskSpan = None,
    language: Language = "en",
    decoding: Decoding = None,
    out: Out = None,
    seed: Seed = 0,
    num_gpu_layers: NumGpuLayers = None,
) -> None:
    """Ask a trained model for an answer.

    \b
    Example: openm6 generate runs/demo --text "draw the digit seven" --output image --out seven.png
    """
    # torch takes seconds to import
    from openm6.inference.question import Question, parse_numbers, parse_series, parse_shares
    from openm6.inference.run import generate as generate_answer
    from openm6.inference.sampling import read_decoding

    question = Question(
        output=output,
        text=text,
        image=image,
        audio=audio,
        numbers=parse_numbers(numbers),
        series=parse_series(series),
        column=column,
        ahead=ahead,
        mask_box=cast(Box | None, parse_shares(mask_box, 4, "--mask-box")),
        mask_span=cast(Span | None, parse_shares(mask_span, 2, "--mask-span")),
        language=language,
    )
    settings = read_decoding([f"text.seed={seed}", f"masked.seed={seed}", *(decoding or [])])
    print_result(generate_answer(trained, question, settings, out, num_gpu_layers))
