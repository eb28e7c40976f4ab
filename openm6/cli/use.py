"""`openm6 generate`, `chat`, `try`, `serve`, `evaluate`, `energy`: answers of a trained model, scores and joules."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openm6.cli.group import print_result, write_json
from openm6.cli.train import Device, Dtype, Model, NumGpuLayers, model_of
from openm6.core.errors import CheckpointError, ConfigError, OpenM6Error, PromptTooLongError
from openm6.core.log import get_log
from openm6.energy.carbon import GPT3_CAVEAT, in_joules

if TYPE_CHECKING:
    from openm6.api.model import OpenM6
    from openm6.energy.tracker import EnergyUse
    from openm6.evaluate.results import EnergyAccount

WIDTH, HEIGHT = 60, 10  # of the plot, in characters
CHINESE = "\u3000-\u303f\u3400-\u9fff\uff00-\uffef"  # characters and punctuation
CHAT_TOKENS = 1024  # of an answer in a chat, which ends by itself


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a run or checkpoint, or name of a model.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="eval.KEY=VALUE", help="Settings, such as eval.answers=300.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Tasks to evaluate; default: all.")] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Table or folder with other records.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the scores as JSON.")] = None,
    scenarios: Annotated[bool, typer.Option("--scenarios", help="Run the examples of all scenarios instead.")] = False,
    num_gpu_layers: NumGpuLayers = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Evaluate a trained model on held-out records.

    \b
    Example: openm6 evaluate runs/demo --tasks image_classification,text_to_image --json scores.json
    All records: openm6 evaluate runs/demo eval.records=1000 eval.answers=1000
    """
    if scenarios and (tasks is not None or data is not None or num_gpu_layers is not None or settings):
        raise ConfigError("--scenarios runs examples of its own: leave all but --json, --device and --dtype out")
    # torch takes seconds to import
    from openm6.hub.find import find_model

    trained = find_model(model_of(model))
    if scenarios:
        # torch takes seconds to import
        from openm6.serve.scenarios.run import results_table, run_scenarios

        print_result(results_table(run_scenarios(trained, json_path, device, dtype)))
        return
    # torch takes seconds to import
    from openm6.evaluate.report import print_table
    from openm6.evaluate.run import evaluate as evaluate_model

    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else None
    report = evaluate_model(
        trained, names, data, json_path, settings or [], device=device, num_gpu_layers=num_gpu_layers, dtype=dtype
    )
    print_table(report, Console())


def energy(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    country: Annotated[str | None, typer.Option(help="Country of the grid; default: the setting of the run.")] = None,
    pue: Annotated[
        float | None, typer.Option(help="Power usage effectiveness; default: the setting of the run.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the account as JSON.")] = None,
) -> None:
    """Print the energy account of a run. It has joules and grams of CO2e by stage, modality and task.

    \b
    Example: openm6 energy runs/demo --country FRA
    """
    print_energy(run, country, pue, json_path)


def print_energy(path: Path, country: str | None, pue: float | None, json_path: Path | None) -> None:
    """Print the energy account of a run; raises CheckpointError without a metered run."""
    # torch takes seconds to import
    from openm6.core.run_folder import RunFolder
    from openm6.evaluate.results import read_account, read_lines
    from openm6.hub.pretrained import read_json

    if not path.is_dir():
        raise CheckpointError(f"there is no run at {path}: check the path")
    run = RunFolder(path)
    reported = read_json(run.path / "report.json").get("energy") or {}
    account = read_account(run, country, pue, float(reported.get("evaluation_joules") or 0.0))
    write_json(account.to_json(), json_path)
    console, tracker = Console(), account.tracker
    console.print(Text(_summary(account)))
    uses = {"stage": tracker.stages, "modality": tracker.modalities, "task": tracker.tasks}
    for title, by_name in uses.items():
        if by_name:
            console.print(_table(account, title, by_name))
    console.print(Text(_plot(read_lines(run))))
    ratio = account.of_gpt3
    words = f"{ratio:.3g} times" if ratio >= 1 else f"{ratio:.3%} of"
    console.print(Text(f"Energy per token: {words} that of GPT-3's training. {GPT3_CAVEAT}"))


def _summary(account: EnergyAccount) -> str:
    tracker = account.tracker
    parts = ", ".join(f"{in_joules(joules)} by {source}" for source, joules in tracker.by_source.items())
    repeated = f" {in_joules(tracker.repeated)} in steps that a crash lost." if tracker.repeated else ""
    return (
        f"{in_joules(tracker.joules)} for {tracker.tokens:,} tokens: "
        f"{account.joules_per_token:.3g} J per token ({parts}). "
        f"{account.grams(tracker.joules):.3g} g CO2e with the grid of {account.grid.name} "
        f"({account.grid.grams_per_kwh:g} g/kWh, {account.grid.year}) and a PUE of {account.pue:g}. "
        f"{in_joules(tracker.between)} between steps: waiting for data, evaluation, checkpoints.{repeated}"
    )


def _table(account: EnergyAccount, title: str, uses: dict[str, EnergyUse]) -> Table:
    table = Table(box=None)
    table.add_column(title, no_wrap=True)
    last = ["J / nat of loss"] if title == "stage" else []
    for name in ("joules", "g CO2e", "tokens", "J / 1,000 tokens", *last):
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True)
    most = max(use.joules for use in uses.values()) or 1.0
    for name, use in sorted(uses.items(), key=lambda item: -item[1].joules):
        per_1000, point = 1000 * use.joules / max(1, use.tokens), account.joules_per_point(name)
        cells = [name, in_joules(use.joules), f"{account.grams(use.joules):.3g}", f"{use.tokens:,}", f"{per_1000:.3g}"]
        cells += ["-" if point is None else in_joules(point)] if last else []
        table.add_row(*(Text(cell) for cell in [*cells, "█" * round(16 * use.joules / most)]))
    return table


def _plot(lines: list[dict[str, Any]]) -> str:
    """Loss over the joules that had been spent when it was reached."""
    points = [
        (line["joules"], line["loss"])
        for line in lines
        if isinstance(line.get("joules"), float) and isinstance(line.get("loss"), float)
    ]
    if len(points) < 2:
        return "No plot: fewer than two lines of metrics hold joules and loss."
    last, low = points[-1][0], min(loss for _, loss in points)
    high = max(max(loss for _, loss in points), low + 1e-9)
    rows = [[" "] * WIDTH for _ in range(HEIGHT)]
    for joules, loss in points:
        column = min(WIDTH - 1, int(joules / last * WIDTH)) if last > 0 else 0
        row = min(HEIGHT - 1, int((high - loss) / (high - low) * HEIGHT))
        rows[row][column] = "•"
    labels = [f"{high:.3g}", *[""] * (HEIGHT - 2), f"{low:.3g}"]
    drawn = [f"{label:>8} │{''.join(row)}" for label, row in zip(labels, rows, strict=True)]
    axis = f"{'':>8} └{'─' * WIDTH}\n{'':>10}0 J{in_joules(last):>{WIDTH - 3}}"
    return "\n".join(["loss over energy", *drawn, axis])


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
        typer.Option(metavar="START,END", help="Span of the audio to inpaint, as fractions of the seconds generated."),
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
    from openm6.api.model import load
    from openm6.api.values import check_file, write_answer
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
    file = check_file(out, output)  # before any work is done
    (answer,) = load(model_of(model), device, dtype, num_gpu_layers).answer([question], settings)
    print_result(write_answer(answer, file))


def chat(model: Model = "mini", device: Device = "auto", dtype: Dtype = "auto") -> None:
    """Chat with a model. @FILE in a line shows it an image or plays it a recording; an empty line ends the chat.

    \b
    Example: openm6 chat runs/demo
    """
    # torch takes seconds to import
    from openm6.api.model import load

    m6, messages = load(model_of(model), device, dtype), list[dict[str, object]]()
    get_log().addFilter(_on_a_new_line)
    typer.echo("> ", nl=False)
    while line := sys.stdin.readline().strip():
        words, files = _files_in(line)
        content = [{"type": kind, "path": name} for name, kind in files]
        content.append({"type": "text", "text": words})
        messages.append({"role": "user", "content": content})
        answer = ""
        try:
            for part in _answer(m6, messages):
                answer += part
                typer.echo(part, nl=False)
            messages.append({"role": "assistant", "content": answer})
        except OpenM6Error as error:
            messages.pop()
            typer.echo(str(error), nl=False)
        typer.echo("\n> ", nl=False)
    get_log().removeFilter(_on_a_new_line)


def _answer(m6: OpenM6, messages: list[dict[str, object]]) -> Iterator[str]:
    """Yield the answer in parts; the oldest turns are removed if all are more than the model reads."""
    for first in range(0, len(messages), 2):
        try:
            yield from m6.chat(messages[first:], max_new_tokens=CHAT_TOKENS, stream=True)
        except PromptTooLongError:
            if first == len(messages) - 1:  # the question alone
                raise
        else:
            del messages[:first]
            return


def _files_in(line: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a line without its files, and their names and kinds. A file has an @ at a start or after Chinese."""
    files: list[tuple[str, str]] = []

    def taken(match: re.Match[str]) -> str:
        word = match[1]
        # Of `face.png?` and `face.png上`, the file is a beginning: the longest that exists.
        ends = [end for end in range(len(word), 0, -1) if not re.match(r"\w", word[end:], re.ASCII)]
        name = next((word[:end] for end in ends if os.path.isfile(word[:end])), None)
        missing = re.match(r".+\.\w+", word, re.ASCII)
        if name is None and missing and _kind_of(missing[0]):
            name = missing[0]  # its absence is an error of the model, which is shown
        if name is None:
            return match[0]
        files.append((name, _kind_of(name) or "image"))
        return "" if name == word else word[len(name) :] + match[2]

    words = re.sub(rf"(?<![^\s{CHINESE}])@(\S+)(\s?)", taken, line)
    return words.strip(), files


def _kind_of(name: str) -> str | None:
    """Return `audio` or `image` by the ending of a name; None for another ending."""
    # torch takes seconds to import
    from openm6.data.records import AUDIO_ENDINGS, IMAGE_ENDINGS

    guessed = (guess_type(name)[0] or "").partition("/")[0]  # a system may lack the types of some endings
    if name.lower().endswith(AUDIO_ENDINGS) or guessed == "audio":
        return "audio"
    return "image" if name.lower().endswith(IMAGE_ENDINGS) or guessed == "image" else None


def _on_a_new_line(_: logging.LogRecord) -> bool:
    """Begin a line for a note, which comes after an answer without a line end."""
    typer.echo()
    return True


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
    """Serve a trained model over HTTP. The routes follow the OpenAI API.

    \b
    Example: openm6 serve runs/demo --port 8000
    """
    if "=" in model and not Path(model).exists():  # a folder may be called lr=0.1
        model, settings = "mini", [model, *(settings or [])]
    trained = model_of(model)
    settings = [f"host={json.dumps(host)}", f"port={port}", f"engine.device={device}", *(settings or [])]
    settings += [f"hosts={json.dumps(allow_host)}"] if allow_host else []
    # torch takes seconds to import, and the server's packages are an extra
    from openm6.inference.load import precision_of
    from openm6.serve.run import read_serve_config
    from openm6.serve.run import serve as serve_api

    precision = precision_of(dtype)
    settings = [*settings, f"engine.weights={precision}"] if precision else settings
    config = read_serve_config(settings, keys)
    if replicas and not ray:
        raise ConfigError("--replicas is for replicas on Ray: add --ray, or leave it out")
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
    """Write a page of a model's answers. They are to examples in all its pairs of modalities.

    \b
    Example: openm6 try runs/demo --out try.html
    """
    # torch takes seconds to import
    from openm6.serve.scenarios.run import try_model as write_page

    print_result(write_page(model_of(model), out, device, dtype))
