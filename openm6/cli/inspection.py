"""The page behind `openm6 data inspect`: what was found, what is broken, and the proposed recipe."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from openm6.data.inspect import DataSet, Inspection


def show_inspection(inspection: Inspection, console: Console) -> None:
    """Print everything; the recipe comes last and bare, so that it can be copied into a file."""
    for data_set in inspection.data_sets:
        _show_data_set(data_set, console)
    if inspection.recipe is None:
        console.print("Nothing here can be trained on as it is; the lines above say why.")
        return
    console.print(
        Text("A recipe to start from; save it as my.yaml and run: openm6 train my.yaml", style="bold")
    )
    console.print(inspection.recipe, markup=False, highlight=False, soft_wrap=True)


def _show_data_set(data_set: DataSet, console: Console) -> None:
    console.print(Text(f"{data_set.name} ({data_set.kind}, {data_set.path})", style="bold"))
    sampled = f", {data_set.sampled:,} looked at" if data_set.sampled < data_set.rows else ""
    console.print(
        f"{data_set.rows:,} rows{sampled}; {data_set.train:,} to train on, {data_set.test:,} to judge by"
    )
    if data_set.columns:
        console.print(_columns(data_set))
    if data_set.unused:
        console.print(Text(f"not used: {', '.join(data_set.unused)}"))
    if data_set.problems:
        console.print(Text(f"broken: {data_set.unreadable + data_set.broken:,} rows, such as", style="red"))
    for problem in data_set.problems:
        console.print(
            Text(f"  {problem.where}: {problem.reason}" if problem.where else f"  {problem.reason}")
        )
    console.print(Text(f"tasks: {', '.join(data_set.tasks) or 'none'}\n"))


def _columns(data_set: DataSet) -> Table:
    table = Table("column", "holds", "missing", "different", "such as", box=None)
    for column in data_set.columns:
        kind = f"{column.kind} ({column.language})" if column.language else column.kind
        # Text, not str: rich would read square brackets in a user's data as its own markup.
        cells = (column.name, kind, str(column.missing), str(column.distinct), column.summary)
        table.add_row(*(Text(cell) for cell in cells))
    return table
