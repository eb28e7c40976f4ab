"""`openm6 tasks`, `openm6 presets` and `openm6 scenarios`: the lists of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from openm6.cli.group import print_result
from openm6.cli.train import model_of
from openm6.core.errors import ConfigError
from openm6.core.files import replace_text


def tasks() -> None:
    """List the tasks: the inputs and the target of each.

    \b
    Example: openm6 tasks
    """
    # torch takes seconds to import
    from openm6.tasks.registry import all_tasks

    table = Table("task", "inputs", "output", "description", box=None)
    for task in all_tasks().values():
        table.add_row(task.name, task.input_modality, task.output_modality, task.summary)
    print_result(table)


def presets() -> None:
    """List the named model sizes.

    \b
    Example: openm6 presets
    """
    # pydantic would slow down `openm6 --help`
    from openm6.models.presets import PRESETS

    table = Table("preset", "parameters", "active per token", "layers", "hidden size", "description", box=None)
    for preset in PRESETS.values():
        total, active = in_short(preset.parameters.total), in_short(preset.parameters.active)
        layers, width = str(preset.backbone.num_layers), str(preset.backbone.hidden_size)
        table.add_row(preset.name, total, active, layers, width, preset.description)
    print_result(table)


def scenarios(
    trained: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Report the readiness of each for this model.")
    ] = None,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the list as JSON; -: standard output.")
    ] = None,
    language: Annotated[str, typer.Option(help="Language: en or zh.")] = "en",
) -> None:
    """List the scenarios: inputs, output, and the recipe that trains each.

    \b
    Example: openm6 scenarios runs/demo
    """
    if language not in ("en", "zh"):
        raise ConfigError(f"--language {language!r} must be en or zh")
    # torch takes seconds to import
    from openm6.serve.scenarios.run import list_scenarios, scenarios_json

    named = None if trained is None else model_of(trained)
    if json_path is None:
        Console().print(list_scenarios(named, "zh" if language == "zh" else "en"))
    elif json_path == "-":
        typer.echo(scenarios_json(named))
    else:
        replace_text(Path(json_path), scenarios_json(named))


def in_short(count: int) -> str:
    """Return a number of parameters or tokens in four digits: 4.1M, 10.07B, 1.003T."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return str(count)
