"""What a recipe's sources hold for training: checks, tokenizer, scales of numbers, trained tasks, held-out batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from openm6.checkpoint.folder import list_checkpoints
from openm6.core.errors import ConfigError, DataError
from openm6.core.files import replace_text
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.core.seeds import numpy_generator
from openm6.data.mixture import Component, MixtureSampler
from openm6.data.packing import Packer
from openm6.data.prepare import ExampleTransform, with_negatives
from openm6.data.propose import unused_columns
from openm6.data.quarantine import Quarantine
from openm6.data.records import Record
from openm6.data.source import Source
from openm6.data.sources import open_sources
from openm6.modalities.batch import Batch as PackedBatch
from openm6.modalities.numbers import Scales, fit_scale
from openm6.modalities.registry import Modalities
from openm6.modalities.text import train_tokenizer
from openm6.models.description import (
    TOKENIZER_FILE,
    TrainedTask,
)
from openm6.parallel.process_group import ProcessGroupContext
from openm6.tasks.prompts import literal_texts, word_count
from openm6.tasks.registry import TASKS
from openm6.tasks.task import LANGUAGES, Task
from openm6.train.recipe import MultimodalRecipe

TEXT_KEYS = ("text_en", "text_zh", "label", "label_zh", "question", "answer")
SCANNED = 20_000  # records of a source that the tokenizer and the column scales are fitted to
SAMPLED = 20  # records of a source in which its tasks look for what they need, evenly spread
SEARCHED = 2_000  # records in which a task looks that found nothing in those
LOOKED_AT = 100  # records, spread over the source


def _texts(source: Source, record_index: int) -> Iterator[str]:
    try:
        record = source[record_index]
    except DataError:  # the quarantine will name it when it is drawn
        return
    for key in TEXT_KEYS:
        if isinstance(record.get(key), str):
            yield record[key]
    for key in ("tags_en", "tags_zh"):
        yield ", ".join(record.get(key) or ())
    for name in (*(record.get("numbers") or ()), *(record.get("series") or ())):
        yield " " + name.replace("_", " ")


def tokenizer_text(recipe: MultimodalRecipe, sources: dict[str, Source], run: RunFolder) -> str:
    """The tokenizer.json of the run: its own from before, the one named, or one learned from sources and prompts."""
    kept = run.path / TOKENIZER_FILE
    # Without a checkpoint the run never began: what lies there may be of another recipe.
    begun = kept.is_file() and bool(list_checkpoints(run.checkpoints))
    named = str(kept) if begun else recipe.modalities.text.tokenizer
    if named is None:
        replace_text(kept, _learned_tokenizer(recipe, sources))
        named = str(kept)
    try:
        return Path(named).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"modalities.text.tokenizer={named!r} cannot be read: {error}") from None


def _learned_tokenizer(recipe: MultimodalRecipe, sources: dict[str, Source]) -> str:
    prompts = [
        text for component in recipe.mixture for language in LANGUAGES
        for prompt in TASKS[component.task].prompts.get(language, ())
        for text in literal_texts(prompt)
    ]  # fmt: skip
    spread = {
        name: np.linspace(0, len(s) - 1, min(len(s), SCANNED)).astype(int) for name, s in sources.items()
    }
    words = (text for name, s in sources.items() for index in spread[name] for text in _texts(s, int(index)))
    get_log().info("learning a tokenizer from the sources")
    return train_tokenizer([*prompts * 20, *words], recipe.vocabulary).to_str()


def fit_scales(sources: Iterable[Source]) -> Scales:
    """Return location and scale of every number column, from training records alone."""
    columns: dict[str, list[float]] = {}
    for source in sources:
        for index in np.linspace(0, len(source) - 1, min(len(source), SCANNED)).astype(int):
            try:
                record = source[int(index)]
            except DataError:
                continue
            for name, value in (record.get("numbers") or {}).items():
                columns.setdefault(name, []).append(np.nan if value is None else float(value))
            for name, values in (record.get("series") or {}).items():
                columns.setdefault(name, []).extend(np.nan if v is None else float(v) for v in values)
    return {name: fit_scale(np.asarray(values)) for name, values in sorted(columns.items())}


def check_sources(recipe: MultimodalRecipe, sources: Mapping[str, Source]) -> None:
    """Log which columns no task reads, and which tasks do not apply to every record.

    Raises:
        DataError: all records of a sample are broken.
        ConfigError: a task finds nothing that it needs in its source.
    """
    for name in dict.fromkeys(component.source for component in recipe.mixture):
        tasks = [TASKS[component.task] for component in recipe.mixture if component.source == name]
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


def _sample(source: Source, limit: int) -> tuple[list[Record], list[DataError]]:
    """Up to `limit` records, evenly spread, and why those that are broken cannot be read."""
    records, broken = [], []
    for index in np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int)):
        try:
            records.append(source[int(index)])
        except DataError as error:
            broken.append(error)
    return records, broken


def trained_tasks(recipe: MultimodalRecipe, sources: dict[str, Source]) -> list[TrainedTask]:
    """Return the tasks of the mixture with the lengths of their texts: much shorter ones were not trained on."""
    return [
        TrainedTask(task=x.task, source=x.source, words=words_read(TASKS[x.task], sources[x.source]))
        for x in recipe.mixture
    ]


def words_read(task: Task, source: Source) -> tuple[int, int] | None:
    """Return the min and max of words of the task's inputs in some records; None if it can read none of them."""
    counts = []
    for index in np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int):
        rng = numpy_generator(0, "words", int(index))
        try:
            record = source[int(index)]
            record = with_negatives(record, source, rng) if task.needs_negatives else record
            counts.append(word_count(task.example(record, rng).source))
        except DataError:
            continue
    return (min(counts), max(counts)) if counts else None


def pack_held_out(
    recipe: MultimodalRecipe, modalities: Modalities, ranks: ProcessGroupContext, count: int
) -> list[PackedBatch]:
    """The first batches of the recipe's mixture over its test records; each rank gets its own rows of them.

    A source that has validation records supplies those instead. Each row is a data shard, so that rows do not
    depend on how many ranks there are. Tasks whose source has neither are left out.

    Raises:
        ConfigError: no source has validation or test records.
        TrainingError: too many of them are broken.
    """
    validation, test = open_sources(recipe.sources, "validation"), open_sources(recipe.sources, "test")
    sources = {name: source if len(source) else test[name] for name, source in validation.items()}
    components = [
        Component(source=sources[component.source], task=component.task, weight=component.weight)
        for component in recipe.mixture
        if len(sources[component.source])
    ]
    if not components:
        raise ConfigError(
            "loop.held_out needs validation or test records and no source of the mixture has any: raise test_share, or "
            "leave it out"
        )
    seed = recipe.loop.seed
    transform = ExampleTransform(MixtureSampler(components, seed), modalities, seed, recipe.loss_weights)
    packing = recipe.packing.model_copy(update={"num_shards": recipe.packing.batch_size})
    packer = Packer(transform, packing, Quarantine(None, recipe.max_broken), ranks.rank, ranks.size)
    batches = packer.batches()
    return [next(batches) for _ in range(count)]
