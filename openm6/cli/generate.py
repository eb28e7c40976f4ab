"""`openm6 generate`: one answer of a trained model from the options of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from openm6.cli.group import print_result
from openm6.cli.train import Trained

Box = tuple[float, float, float, float]  # left, top, right, bottom
Span = tuple[float, float]  # start, end
Output = Annotated[str, typer.Option("--output", help="Output modality: text, image, audio or numbers.")]
Text = Annotated[str | None, typer.Option("--text", help="Text input.")]
Image = Annotated[Path | None, typer.Option("--image", help="Image input (file).")]
Recording = Annotated[Path | None, typer.Option("--audio", help="Audio input (file).")]
Numbers = Annotated[
    str | None,
    typer.Option("--numbers", metavar="NAME=VALUE,...", help="Input numbers; NAME= is a missing value."),
]
Series = Annotated[str | None, typer.Option("--series", metavar="NAME=V,V,...", help="Time series to forecast.")]
Column = Annotated[str | None, typer.Option("--column", help="Name of the number to predict.")]
Ahead = Annotated[int, typer.Option("--ahead", min=1, max=64, help="Steps to forecast.")]
MaskBox = Annotated[
    str | None,
    typer.Option("--mask-box", metavar="L,T,R,B", help="Box of the image to inpaint, as fractions of its sides."),
]
MaskSpan = Annotated[
    str | None,
    typer.Option("--mask-span", metavar="START,END", help="Span of the audio to inpaint, as fractions of its length."),
]
Language = Annotated[str, typer.Option("--language", help="Language of the prompt without --text: en or zh.")]
Decoding = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Decoding: text.temperature, text.top_p, masked.steps, masked.guidance…",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Output file.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the decoding.")]

NumGpuLayers = Annotated[
    int | None,
    typer.Option("--num-gpu-layers", min=0, help="Layers that stay on the device; the others are offloaded."),
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
    """Generate text, an image, audio or numbers with a trained model.

    \b
    Example: openm6 generate runs/demo --text "draw the digit seven" --output image --out seven.png
    """
    # torch takes seconds to import
    from openm6.inference.question import Question, parse_fractions, parse_numbers, parse_series
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
        mask_box=cast(Box | None, parse_fractions(mask_box, 4, "--mask-box")),
        mask_span=cast(Span | None, parse_fractions(mask_span, 2, "--mask-span")),
        language=language,
    )
    settings = read_decoding([f"text.seed={seed}", f"masked.seed={seed}", *(decoding or [])])
    print_result(generate_answer(trained, question, settings, out, num_gpu_layers))
