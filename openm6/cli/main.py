"""The `openm6` command: words become one call each; what the calls do lives on lower floors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.protocol import is_renderable

from openm6 import __version__
from openm6.base.errors import ConfigError
from openm6.cli.bench import bench_app
from openm6.cli.convert import convert
from openm6.cli.doors import door
from openm6.cli.energy import energy
from openm6.cli.group import PlainGroup
from openm6.cli.plan import plan
from openm6.cli.scenarios import scenarios
from openm6.cli.serve import serve

DEMO = "demo"  # the shipped recipe that `openm6 demo` trains

app = typer.Typer(
    cls=PlainGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at your own data.")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.command()(plan)
app.command()(energy)
app.command()(serve)
app.command()(convert)
app.command()(scenarios)

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings to change.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's latest checkpoint.")]
Processes = Annotated[
    int, typer.Option("--nproc", min=1, help="Processes on this machine, a GPU each where there are some.")
]
Restarts = Annotated[
    int, typer.Option("--max-restarts", min=0, help="How often to start again after a process has failed.")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run; by default runs/NAME of the recipe.")
]
Trained = Annotated[
    Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Folder of a run or of one checkpoint.")
]


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="openm6")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """One sparse-expert transformer that takes in and gives out text, images, sound and numbers.

    Start with: openm6 demo
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/demo"),
    resume: Resume = False,
) -> None:
    """Train and judge the small model; about ten minutes on two cores.

    It learns from the data in the package and ends with a report.

    \b
    Example: openm6 demo --out runs/demo
    """
    _show(door("train")(DEMO, [], resume, out))


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Resume = False,
    out: Out = None,
    nproc: Processes = 1,
    max_restarts: Restarts = 0,
) -> None:
    """Train what a recipe describes.

    \b
    Example: openm6 train recipes/demo.yaml loop.steps=2000 --out runs/longer
    Several processes: openm6 train recipes/demo.yaml --nproc 2
    """
    if nproc > 1 or max_restarts:
        words = ["train", recipe, *(overrides or []), *(["--resume"] if resume else [])]
        door("launch")([*words, *(["--out", str(out)] if out else [])], nproc, max_restarts)
    else:
        _show(door("train")(recipe, overrides or [], resume, out))


@app.command()
def evaluate(
    trained: Trained,
    tasks: Annotated[str | None, typer.Option("--tasks", metavar="A,B", help="Only these tasks.")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Judge on these records instead (Parquet, CSV, JSONL)."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the scores there.")
    ] = None,
    scenarios: Annotated[
        bool, typer.Option("--scenarios", help="Run the examples of all scenarios instead.")
    ] = False,
) -> None:
    """Judge a trained model on held-out records.

    \b
    Example: openm6 evaluate runs/demo --tasks name_picture,draw --json scores.json
    """
    if scenarios:
        if tasks is not None or data is not None:
            raise ConfigError("--scenarios runs examples of its own: leave --tasks and --data out")
        Console().print(door("tried scenarios")(door("run scenarios")(trained, json_path)))
        return
    judgement = door("evaluate")(trained, tasks=_names(tasks), data=data, json_path=json_path)
    door("show judgement")(judgement, Console())


@app.command()
def generate(
    trained: Trained,
    want: Annotated[str, typer.Option("--want", help="text, image, sound or numbers.")],
    text: Annotated[str | None, typer.Option("--text", help="What to say to the model.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="A picture to show it.")] = None,
    sound: Annotated[Path | None, typer.Option("--sound", help="A recording to play to it.")] = None,
    numbers: Annotated[
        str | None,
        typer.Option("--numbers", metavar="NAME=VALUE,...", help="Numbers to tell it; NAME= is missing."),
    ] = None,
    series: Annotated[
        str | None, typer.Option("--series", metavar="NAME=V,V,...", help="A series to forecast.")
    ] = None,
    column: Annotated[str | None, typer.Option("--column", help="The number wanted.")] = None,
    ahead: Annotated[int, typer.Option("--ahead", min=1, max=64, help="Steps to forecast.")] = 8,
    hole: Annotated[
        str | None,
        typer.Option("--hole", metavar="L,T,R,B", help="Box of the picture to fill in, as shares."),
    ] = None,
    gap: Annotated[
        str | None,
        typer.Option("--gap", metavar="START,END", help="Stretch of the sound to fill in, as shares."),
    ] = None,
    decoding: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="text.temperature, text.top_p, masked.steps, masked.guidance…"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File for the answer.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same answer.")] = 0,
    resident: Annotated[
        int | None,
        typer.Option("--resident", min=0, help="Layers that stay on the device; the others come when used."),
    ] = None,
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
        numbers=parse_numbers(numbers),
        series=door("series")(series),
        column=column,
        ahead=ahead,
        hole=door("shares")(hole, 4, "--hole"),
        gap=door("shares")(gap, 2, "--gap"),
    )
    seeds = [f"text.seed={seed}", f"masked.seed={seed}"]
    _show(door("generate")(trained, question, door("decoding")([*seeds, *(decoding or [])]), out, resident))


@data_app.command()
def inspect(path: Annotated[str, typer.Argument(help="A folder, a table, or their address.")]) -> None:
    """Say what is in your data, what is broken, and propose a recipe for it.

    \b
    Example: openm6 data inspect ~/photos
    """
    door("show inspection")(door("inspect")(path), Console())


@app.command()
def tasks() -> None:
    """List the tasks: what each one reads, what it gives.

    \b
    Example: openm6 tasks
    """
    _show(door("list tasks")())


@app.command()
def presets() -> None:
    """List the named model sizes.

    \b
    Example: openm6 presets
    """
    _show(door("list presets")())


def parse_numbers(words: str | None) -> dict[str, float | None] | None:
    """`mass=3.5,length=` as a mapping; nothing after the equals sign means missing.

    Raises:
        ConfigError: a part without a name, or with a value that is not a number.
    """
    if words is None:
        return None
    numbers: dict[str, float | None] = {}
    for part in words.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            numbers[name] = float(value) if value else None
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ConfigError(f"--numbers has {part!r}, which must look like name=3.5")
    return numbers


def _names(words: str | None) -> list[str] | None:
    return [word.strip() for word in words.split(",") if word.strip()] if words else None


def _show(result: Any) -> None:
    """Print what a call gave back, if anything: rich knows how to draw tables, the rest says itself by `str`."""
    if result is not None:
        # rich would print a dataclass field by field, where its own words are meant.
        shown = result if is_renderable(result) else str(result)
        Console().print(shown, soft_wrap=True, highlight=False, markup=False)
