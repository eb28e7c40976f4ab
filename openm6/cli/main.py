"""The `openm6` command: its subcommands, and what it sets before they run."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from openm6 import __version__
from openm6.cli.group import make_app
from openm6.cli.listings import inspect, presets, scenarios, tasks
from openm6.cli.plan import plan
from openm6.cli.train import convert, demo, export, import_model, train
from openm6.cli.use import chat, energy, evaluate, generate, serve, try_model

app = make_app()
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Inspect your own data.")
app.add_typer(data_app, name="data")
data_app.command()(inspect)
for command in (demo, train, evaluate, generate, chat, serve, scenarios, plan, energy, convert, export, tasks, presets):
    app.command()(command)
app.command("import")(import_model)
app.command("try")(try_model)


def main() -> None:
    # torch reads this when it is imported. Waiting threads that spin would slow down a machine with other load.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app(prog_name="openm6")


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A sparse mixture-of-experts transformer with text, images, audio and numbers as inputs and outputs.

    Start with: openm6 try
    """
