"""`openm6 energy`: what a run has cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.doors import door


def energy(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    country: Annotated[
        str | None, typer.Option("--country", help="Whose current it was; left out: the run's setting.")
    ] = None,
    pue: Annotated[
        float | None, typer.Option("--pue", help="Joules of the building for each joule of the devices.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the account there.")
    ] = None,
) -> None:
    """Account for a run: joules and grams of CO2e by stage, modality and task, a token and a point of loss.

    \b
    Example: openm6 energy runs/demo --country FRA
    """
    door("show energy")(run, country, pue, json_path)
