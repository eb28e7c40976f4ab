"""What a checkpoint says of the tasks that its model was trained on."""

from __future__ import annotations

import numpy as np

from openm6.base.errors import DataError
from openm6.base.seeds import numpy_generator
from openm6.data.prepare import with_others
from openm6.data.source import Source
from openm6.models.description import Lesson
from openm6.tasks.prompts import word_count
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Task
from openm6.train.recipe import MultimodalRecipe

LOOKED_AT = 100  # records, spread over the source


def trained_tasks(recipe: MultimodalRecipe, sources: dict[str, Source]) -> list[Lesson]:
    """The tasks of the mixture with the lengths of their texts: much shorter ones were not taught."""
    return [
        Lesson(task=x.task, source=x.source, words=words_read(TASKS[x.task], sources[x.source]))
        for x in recipe.mixture
    ]


def words_read(task: Task, source: Source) -> tuple[int, int] | None:
    """The fewest and the most words that the task reads in some records; None if it can read none of them."""
    counts = []
    for index in np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int):
        rng = numpy_generator(0, "words", int(index))
        try:
            record = source[int(index)]
            record = with_others(record, source, rng) if task.compares else record
            counts.append(word_count(task.example(record, rng).source))
        except DataError:
            continue
    return (min(counts), max(counts)) if counts else None
