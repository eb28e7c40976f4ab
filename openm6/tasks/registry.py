"""Tasks by name: the built-in ones, those of installed packages, and own ones of a recipe or a checkpoint.

A new built-in task is an entry of `built_in.yaml`.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from openm6.core.config import build, read_yaml
from openm6.core.errors import ConfigError, nearest
from openm6.core.extensions import installed
from openm6.core.files import renamed
from openm6.tasks import chat, design, slots
from openm6.tasks.own import TaskConfig
from openm6.tasks.slots import KINDS, Derived, Slot
from openm6.tasks.task import Task

SLOTS: dict[str, Slot] = {**slots.SLOTS, **design.SLOTS, **chat.SLOTS}


def _slot(form: Any, name: str) -> Slot:
    """One of SLOTS, or a kind with the field that it reads, by default the one that is called `name`."""
    if isinstance(form, str) and form in SLOTS:
        return SLOTS[form]
    (kind, field), *options = {form: name}.items() if isinstance(form, str) else form.items()
    if kind not in KINDS:
        raise ConfigError(f"no slot is called {kind!r}; {nearest(kind, [*SLOTS, *KINDS])}")
    return KINDS[kind](field, **dict(options))


def read_tasks(entries: Mapping[str, Any]) -> dict[str, Task]:
    """Tasks by name, from entries as in `built_in.yaml`; ConfigError if one names a slot that does not exist."""
    found = {}
    for name, entry in entries.items():
        prompts = {key: (one,) if isinstance(one, str) else tuple(one) for key, one in entry["prompts"].items()}
        parsed: dict[str, Any] = {
            "name": name,
            "inputs": {key: _slot(form, key) for key, form in entry["inputs"].items()},
            "target": _slot(entry["target"], "text"),
            "prompts": prompts,
            "metrics": tuple(entry.get("metrics", ())),
        }
        found[name] = Task(**{**entry, **parsed})
    return found


TASKS = read_tasks(read_yaml(Path(__file__).with_name("built_in.yaml")))
NONE: Mapping[str, Any] = MappingProxyType({})


@functools.cache
def _installed() -> Mapping[str, Task]:
    """The built-in tasks, and those of the entry points `openm6.tasks`, which cannot replace them."""
    found = {name: replace(task, name=name) for name, task in installed("openm6.tasks", Task).items()}
    return MappingProxyType({**found, **TASKS})


def all_tasks(own: Mapping[str, Any] = NONE) -> Mapping[str, Task]:
    """All tasks by name; `own`: those of a recipe or a checkpoint, as configs or plain values (ConfigError)."""
    if not own:
        return _installed()
    plain = {name: config for name, config in own.items() if not isinstance(config, TaskConfig)}
    built = {name: build(TaskConfig, values, f"task {name}") for name, values in plain.items()}
    return {**_installed(), **{name: config.task(name) for name, config in {**own, **built}.items()}}


def any_masks_words(trained: Iterable[str], own: Mapping[str, Any]) -> bool:
    """Whether one of the trained tasks masks words of texts, so that those of users may have gaps."""
    known = all_tasks(own)
    targets = (known[name].target for name in trained if name in known)
    return any(isinstance(target, Derived) and target.build is slots.mask_words for target in targets)


def unknown_task(name: str, known: Mapping[str, Task] = NONE) -> str:
    """The sentence about a name that no task has: its new name, or the nearest of the known ones."""
    if new := renamed("task").get(name):
        return f"the task {name!r} was renamed to {new!r}"
    return f"no task is called {name!r}; {nearest(name, sorted(known or all_tasks()))}"


def task_named(name: str, known: Mapping[str, Task] = NONE) -> Task:
    """The task of this name among the known ones, by default all but own ones; ConfigError with the nearest if none."""
    known = known or all_tasks()
    if name not in known:
        raise ConfigError(unknown_task(name, known))
    return known[name]
