"""The `openm6` command: words become one call each; what the calls do lives on lower floors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from openm6 import __version__
from openm6.base.errors import ConfigError
from openm6.cli.convert import convert
from openm6.cli.doors import door
from openm6.cli.energy import energy
from openm6.cli.generate import generate
from openm6.cli.group import PlainGroup
from openm6.cli.plan import plan
from openm6.cli.scenarios import scenarios
from openm6.cli.serve import serve
from openm6.cli.show import show

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
    # Read when torch is imported. Threads that spin while they wait take the cores from those that work, as soon as
    # another program wants some of them, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
    """Train and evaluate the small model; about six minutes on two cores.

    It learns from the data in the package and ends with a report.

    \b
    Example: openm6 demo --out runs/demo
    """
    show(door("train")(DEMO, [], resume, out))


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
        show(door("train")(recipe, overrides or [], resume, out))


@app.command()
def evaluate(
    trained: Trained,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="judge.KEY=VALUE", help="Settings, as judge.answers=300.")
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", metavar="A,B", help="Only these tasks.")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", help="Judge on the records of this table or folder instead."),
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
    All records: openm6 evaluate runs/demo judge.records=1000 judge.answers=1000
    """
    if scenarios:
        if tasks is not None or data is not None or settings:
            raise ConfigError("--scenarios runs examples of its own: leave --tasks, --data and settings out")
        Console().print(door("tried scenarios")(door("run scenarios")(trained, json_path)))
        return
    judgement = door("evaluate")(
        trained, tasks=_names(tasks), data=data, json_path=json_path, settings=settings or []
    )
    door("show judgement")(judgement, Console())


app.command()(generate)


@data_app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A folder, a table, or their address.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the recipe there, such as my.yaml.")
    ] = None,
) -> None:
    """Say what is in your data, what is broken, and propose a recipe for it.

    \b
    Example: openm6 data inspect ~/photos --out photos.yaml
    """
    door("show inspection")(door("inspect")(path), out, Console())


@app.command()
def tasks() -> None:
    """List the tasks: what each one reads, what it gives.

    \b
    Example: openm6 tasks
    """
    show(door("list tasks")())


@app.command()
def presets() -> None:
    """List the named model sizes.

    \b
    Example: openm6 presets
    """
    show(door("list presets")())


def _names(words: str | None) -> list[str] | None:
    return [word.strip() for word in words.split(",") if word.strip()] if words else None
