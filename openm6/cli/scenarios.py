"""`openm6 scenarios`: the served uses, in a table or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from openm6.base.errors import ConfigError
from openm6.base.files import replace_text
from openm6.cli.doors import door

STANDARD_OUTPUT = "-"


def scenarios(
    trained: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN|CHECKPOINT]", help="Say which of them this model can do."),
    ] = None,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all that is known; - prints it.")
    ] = None,
    language: Annotated[str, typer.Option("--language", help="en or zh.")] = "en",
) -> None:
    """List the scenarios: what each takes, what it gives, what teaches it.

    \b
    Example: openm6 scenarios runs/demo
    """
    if language not in ("en", "zh"):
        raise ConfigError(f"--language {language!r} must be en or zh")
    if json_path is None:
        Console().print(door("list scenarios")(trained, language))
        return
    text = door("scenarios as json")(trained)
    if json_path == STANDARD_OUTPUT:
        typer.echo(text)
    else:
        replace_text(Path(json_path), text)
