"""The table behind `openm6 tasks`."""

from __future__ import annotations

from rich.table import Table

from openm6.tasks.registry import TASKS


def list_tasks() -> Table:
    """One row per task."""
    table = Table("task", "reads", "gives", "what it asks", box=None)
    for task in TASKS.values():
        table.add_row(task.name, task.reads, task.gives, task.summary)
    return table
