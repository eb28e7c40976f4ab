"""`openm6 generate`: one answer of a trained model from the options of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from openm6.cli.group import print_result
from openm6.cli.train import Device, Dtype, NumGpuLayers, Trained


def generate(
    trained: Trained,
    output: Annotated[str, typer.Option(help="Output modality: text, image, audio or numbers.")],
    text: Annotated[str | None, typer.Option(help="Text input.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image input (file).")] = None,
    audio: Annotated[Path | None, typer.Option(help="Audio input (file).")] = None,
    numbers: Annotated[
        str | None, typer.Option(metavar="NAME=VALUE,...", help="Input numbers; NAME= is a missing value.")
    ] = None,
    series: Annotated[str | None, typer.Option(metavar="NAME=V,V,...", help="Time series to forecast.")] = None,
    column: Annotated[str | None, typer.Option(help="Name of the number to predict.")] = None,
    ahead: Annotated[int, typer.Option(min=1, max=64, help="Steps to forecast.")] = 8,
    mask_box: Annotated[
        str | None, typer.Option(metavar="L,T,R,B", help="Box of the image to inpaint, as fractions of its sides.")
    ] = None,
    mask_span: Annotated[
        str | None,
        typer.Option(metavar="START,END", help="Span of the audio to inpaint, as fractions of its length."),
    ] = None,
    language: Annotated[str, typer.Option(help="Language of the prompt without --text: en or zh.")] = "en",
    decoding: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Decoding: text.temperature, text.top_p, masked.steps, masked.guidance…"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the decoding.")] = 0,
    num_gpu_layers: NumGpuLayers = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Generate text, an image, audio or numbers with a trained model.

    \b
    Example: openm6 generate runs/demo --text "draw the digit seven" --output image --out seven.png
    """
    # torch takes seconds to import
    from openm6.api.model import answer_question
    from openm6.inference.question import Question, parse_fractions, parse_numbers, parse_series
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
        mask_box=cast(tuple[float, float, float, float] | None, parse_fractions(mask_box, 4, "--mask-box")),
        mask_span=cast(tuple[float, float] | None, parse_fractions(mask_span, 2, "--mask-span")),
        language=language,
    )
    settings = read_decoding([f"text.seed={seed}", f"masked.seed={seed}", *(decoding or [])])
    print_result(answer_question(trained, question, settings, out, num_gpu_layers, device, dtype))
