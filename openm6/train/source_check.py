"""What the tasks of a mixture find in their sources, looked at before the first step and told to the person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from openm6.base.errors import ConfigError, DataError
from openm6.base.log import get_log
from openm6.data.propose import unused_columns
from openm6.data.records import Record
from openm6.data.source import Source
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Task
from openm6.train.recipe import MultimodalRecipe

SAMPLED = 20  # records of a source in which its tasks look for what they need, evenly spread
SEARCHED = 2_000  # records in which a task looks that found nothing in those


def check_sources(recipe: MultimodalRecipe, sources: Mapping[str, Source]) -> None:
    """Log which columns no task reads, and which tasks do not apply to every record.

    Raises:
        DataError: all records of a sample are broken.
        ConfigError: a task finds nothing that it needs in its source.
    """
    for name in dict.fromkeys(lecture.source for lecture in recipe.mixture):
        tasks = [TASKS[lecture.task] for lecture in recipe.mixture if lecture.source == name]
        _check(name, sources[name], tasks)


def _check(name: str, source: Source, tasks: Sequence[Task]) -> None:
    records, broken = _sample(source, SAMPLED)
    if not records:
        raise DataError(
            f"all of the {len(broken)} records looked at in source {name!r} are broken: {broken[0]}"
        )
    for task in tasks:
        found = [record for record in records if task.languages(record)]
        looked = len(records)
        if not found:  # rare, but perhaps not absent
            more, _ = _sample(source, SEARCHED)
            found, looked = [record for record in more if task.languages(record)], len(more)
            records += found[:1]
        if not found:
            raise ConfigError(
                f"task {task.name} finds nothing to read in source {name!r}: "
                f"map the fields it needs ({task.summary}), or choose another task"
            )
        if len(found) < looked:
            get_log().info(
                f"{task.name}/{name}: {looked - len(found)} of {looked} records looked at lack a field that the task "
                "needs; they are skipped for it"
            )
    unused = unused_columns(source, records, tasks)
    if unused:
        get_log().info(f"source {name}: no task reads the columns {', '.join(map(repr, unused))}")


def _sample(source: Source, most: int) -> tuple[list[Record], list[DataError]]:
    """Up to `most` records, evenly spread, and why those that are broken cannot be read."""
    records, broken = [], []
    for index in np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)):
        try:
            records.append(source[int(index)])
        except DataError as error:
            broken.append(error)
    return records, broken
