"""`openm6 convert …`: a checkpoint made fit for another stage or another number of bytes a parameter."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.doors import door


class StageWord(StrEnum):
    """Stages that a checkpoint can be taken to."""

    real = "real"
    pseudo = "pseudo"


class MomentsWord(StrEnum):
    """What becomes of the optimizer's memory of shared weights."""

    independent = "independent"
    aligned = "aligned"
    reset = "reset"


def convert(
    trained: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Folder of a run or of one checkpoint.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new run.")],
    size: Annotated[
        int | None, typer.Option("--bytes", metavar="16|4|2|1", help="Bytes a parameter.")
    ] = None,
    stage: Annotated[
        StageWord | None, typer.Option("--stage", help="real: each layer with weights of its own.")
    ] = None,
    moments: Annotated[
        MomentsWord, typer.Option("--moments", help="What layers inherit of shared weights' moments.")
    ] = MomentsWord.independent,
) -> None:
    """Turn a checkpoint into one of another stage or byte tier.

    \b
    Example: openm6 convert runs/demo --bytes 2 --out runs/demo-2
    """
    wanted = stage.value if stage is not None else None
    typer.echo(door("convert")(trained, out, size, wanted, moments.value))
