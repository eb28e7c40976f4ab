"""The built-in tasks by name. A new one is an entry in the file of its subject."""

from __future__ import annotations

from dataclasses import replace

from openm6.core.errors import ConfigError, nearest
from openm6.core.files import renamed
from openm6.tasks import audio, design, image, shop, tables, text
from openm6.tasks.task import Task

SUBJECTS = (text, image, design, audio, tables, shop)
TASKS = {name: replace(task, name=name) for subject in SUBJECTS for name, task in subject.TASKS.items()}


def unknown_task(name: str) -> str:
    """The sentence about a name that no task has: its new name, or the nearest."""
    if new := renamed("task").get(name):
        return f"the task {name!r} was renamed to {new!r}"
    return f"no task is called {name!r}; {nearest(name, sorted(TASKS))}"


def task_named(name: str) -> Task:
    """The task of this name; ConfigError, with the nearest name, if there is none."""
    if name not in TASKS:
        raise ConfigError(unknown_task(name))
    return TASKS[name]
