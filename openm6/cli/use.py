"""`openm6 generate`, `try` and `serve`: one answer of a trained model, its examples on a page, and its HTTP API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer

from openm6.cli.group import print_result
from openm6.cli.train import Device, Dtype, Model, NumGpuLayers, model_of
from openm6.core.errors import ConfigError


def generate(
    output: Annotated[str, typer.Option(help="Output modality: text, image, audio or numbers.")],
    model: Model = "mini",
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
    print_result(answer_question(model_of(model), question, settings, out, num_gpu_layers, device, dtype))


def serve(
    model: Model = "mini",
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings: engine.max_num_seqs=32, limits.pixels=…"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Model name in requests; default: the folder.")] = None,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of API keys, one per line; default: OPENM6_API_KEYS.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Host of images to fetch by https; repeatable.")
    ] = None,
    playground: Annotated[
        bool, typer.Option("--playground", help="Add a page for the browser at /playground.")
    ] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Run replicas on Ray Serve; needs the extra [ray].")] = False,
    replicas: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With --ray: min_replicas, max_replicas, cpus, gpus, …"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a trained model over HTTP, with routes that follow the OpenAI API.

    \b
    Example: openm6 serve runs/demo --port 8000
    """
    if "=" in model:
        model, settings = "mini", [model, *(settings or [])]
    trained = model_of(model)
    settings = [f"host={host}", f"port={port}", f"engine.device={device}", *(settings or [])]
    if allow_host:
        settings.append(f"hosts={json.dumps(allow_host)}")
    # torch takes seconds to import, and the server's packages are an extra
    from openm6.inference.load import precision_of
    from openm6.serve.run import read_serve_config
    from openm6.serve.run import serve as serve_api

    precision = precision_of(dtype)
    settings = [*settings, f"engine.weights={precision}"] if precision else settings

    config = read_serve_config(settings, keys)
    if ray:
        if playground:
            raise ConfigError("--playground keeps its visits in one process: leave it out with --ray")
        # Ray is an extra of its own
        from openm6.serve.replicas import serve_replicas

        serve_replicas(trained, config, name, replicas)
    elif playground:
        # only this page needs its packages
        from openm6.serve.playground.page import add_playground

        serve_api(trained, config, name, configure_app=add_playground)
    else:
        serve_api(trained, config, name)


def try_model(
    model: Model = "mini",
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("try.html"),
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer examples that belong to a model, in all its pairs of modalities, on one page.

    \b
    Example: openm6 try runs/demo --out try.html
    """
    # torch takes seconds to import
    from openm6.serve.scenarios.run import try_model as write_page

    print_result(write_page(model_of(model), out, device, dtype))
