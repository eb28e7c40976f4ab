"""The list of tasks: adding one is a line in its family's file."""

from __future__ import annotations

from openm6.base.config import nearest
from openm6.base.errors import ConfigError
from openm6.tasks import analysis, contrasts, design, pictures, poems, shop, sounds, tables, texts
from openm6.tasks.task import Task

FAMILIES = (texts, poems, pictures, design, sounds, tables, analysis, shop, contrasts)
TASKS: dict[str, Task] = {task.name: task for family in FAMILIES for task in family.TASKS}


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigError: there is none; the sentence names the nearest.
    """
    if name not in TASKS:
        raise ConfigError(f"no task is called {name!r}; {nearest(name, sorted(TASKS))}")
    return TASKS[name]
