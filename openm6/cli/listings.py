"""`openm6 tasks`, `presets` and `scenarios`: lists of the package. `openm6 data inspect`: the content of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openm6.cli.group import print_result
from openm6.cli.train import model_of
from openm6.core.errors import ConfigError
from openm6.core.files import check_writable, replace_text
from openm6.data.quarantine import MAX_BROKEN

if TYPE_CHECKING:
    from openm6.data.inspect import DatasetReport, Inspection


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
    """List the scenarios. Each has inputs, an output, and a recipe that trains it.

    \b
    Example: openm6 scenarios runs/demo
    """
    if language not in ("en", "zh"):
        raise ConfigError(f"--language {language!r} must be en or zh")
    # torch takes seconds to import
    from openm6.serve.scenarios.run import list_scenarios, scenarios_json

    named = None if trained is None else model_of(trained)
    if json_path is None:
        print_result(list_scenarios(named, "zh" if language == "zh" else "en"))
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


def inspect(
    path: Annotated[str, typer.Argument(help="Folder or table, or its URL.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File for the recipe, such as my.yaml.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Time limit of the training.")] = 10.0,
    target: Annotated[str | None, typer.Option(metavar="COLUMN", help="The column to predict; default: each.")] = None,
    start: Annotated[str | None, typer.Option(metavar="RUN", help="The model to train further.")] = None,
) -> None:
    """Report columns, problems and tasks of your data, and propose a recipe.

    \b
    Example: openm6 data inspect ~/photos --out photos.yaml
    """
    if out is not None:
        # It may hold hours of a person's work
        if out.exists():
            raise ConfigError(f"--out {out} exists already: name another file, or remove it")
        check_writable(out, "--out")
    # torch takes seconds to import
    from openm6.data.inspect import inspect_path

    print_inspection(inspect_path(path, minutes, target, start), out)


def print_inspection(inspection: Inspection, out: Path | None) -> None:
    """Print everything; the recipe, if there is one, comes last and bare, or is written to `out`."""
    console = Console()
    for data_set in inspection.datasets:
        _print_data_set(data_set, console)
    recipe = inspection.usable_recipe()
    if out is None:
        ask = "A recipe to start from; --out my.yaml writes it to a file, which openm6 train my.yaml trains:"
        console.print(Text(ask, style="bold"))
        typer.echo(recipe)  # as it is: rich would expand tabs and names of emoji
        return
    replace_text(out, recipe)
    console.print(f"wrote {out}; train it with: openm6 train {out}", markup=False, highlight=False, soft_wrap=True)


def _print_data_set(data_set: DatasetReport, console: Console) -> None:
    console.print(Text(f"{data_set.name} ({data_set.kind}, {data_set.path})", style="bold"))
    sampled = f", {data_set.sampled:,} sampled" if data_set.sampled < data_set.rows else ""
    validation = f", {data_set.validation:,} for validation" if data_set.validation else ""
    console.print(
        f"{data_set.rows:,} rows{sampled}; {data_set.train:,} for training{validation}, {data_set.test:,} for testing"
    )
    if data_set.columns:
        print_result(_columns(data_set))
    if codes := [column.name for column in data_set.columns if column.coded]:
        hint = (
            f"whole numbers read as categories: {', '.join(codes)}. To predict one as a number, move it from "
            "`categories` to `numbers` in the recipe"
        )
        console.print(Text(hint), soft_wrap=True)
    if data_set.unused:
        console.print(Text(f"unused columns: {', '.join(data_set.unused)}"))
    if data_set.unreadable + data_set.broken:
        console.print(Text(f"broken rows: {data_set.unreadable + data_set.broken:,}", style="red"))
    for problem in data_set.problems:
        console.print(Text(f"  {problem}"), soft_wrap=True)
    fraction = data_set.broken_fraction
    if data_set.tasks and fraction > MAX_BROKEN:
        advice = f"fix them, or let it pass with max_broken={min(1.0, fraction + MAX_BROKEN):.2f}"
        warning = f"That is {fraction:.0%}, and training stops above {MAX_BROKEN:.0%}: {advice}"
        console.print(Text(warning, style="red"), soft_wrap=True)
    console.print(Text(f"tasks: {', '.join(data_set.tasks) or 'none'}\n"))


def _columns(data_set: DatasetReport) -> Table:
    table = Table("column", "type", "missing", "distinct", "examples", box=None)
    for column in data_set.columns:
        note = "whole numbers" if column.coded else column.language
        kind = f"{column.kind} ({note})" if note else column.kind
        # Text, not str: rich would read square brackets in a user's data as its own markup.
        cells = (column.name, kind, str(column.missing), str(column.distinct), column.summary)
        table.add_row(*(Text(cell) for cell in cells))
    return table
