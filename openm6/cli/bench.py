"""`openm6 bench …`: one command for each benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure, beside the peer where there is one."
)

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there as well.")]


@bench_app.callback()
def start() -> None:
    """Every benchmark prints one JSON object; it ends within eight minutes and prints what it has if cut short."""
