"""What a recipe's sources hold for training: checks, tokenizer, scales of numbers, trained tasks, held-out batches."""

import itertools
import math
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from openm6.checkpoint.folder import PREDICTORS_FILE, list_checkpoints
from openm6.core.errors import ConfigError, DataError
from openm6.core.files import replace_text
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.data.mixture import Component, MixtureSampler
from openm6.data.packing import Packer
from openm6.data.prepare import ExampleTransform
from openm6.data.propose import unused_columns
from openm6.data.quarantine import Quarantine
from openm6.data.records import Record, check_columns, contents_of, unless_broken
from openm6.data.source import Source
from openm6.data.sources import PairSource, open_sources
from openm6.data.table import TableConfig
from openm6.data.windows import WindowSource
from openm6.distributed.process_group import ProcessGroupContext
from openm6.evaluate.answers import build_examples, evenly_spaced
from openm6.modalities.batch import Batch as PackedBatch
from openm6.modalities.numbers import Scales
from openm6.modalities.registry import Modalities
from openm6.modalities.regression import FittedRidges
from openm6.modalities.series import NumberSeries, SeriesStats, fit_column, fit_scale, fit_series
from openm6.modalities.simple_predictors import IMAGE, RAW, TablePredictors, fold_of, image_features, to_bytes
from openm6.modalities.text import train_tokenizer
from openm6.models.description import TOKENIZER_FILE, TrainedTask
from openm6.tasks.slots import ABSENT, Context, Derived, Text, as_text, categories, input_only, pinned, predictable
from openm6.tasks.task import Task, literal_texts, word_count
from openm6.train.image_network import NetworkPlan
from openm6.train.recipe import MultimodalRecipe
from openm6.train.simple_predictors import MAX_ROWS, Labels, covers, fit_table

TEXT_KEYS = ("text_en", "text_zh", "label", "label_zh", "question", "answer")
SCANNED = 20_000  # records of a source that the tokenizer and the column scales are fitted to
SERIES_WINDOWS = 200  # windows of a source in which a period is looked for
RIDGE_WINDOWS = 4000  # to which regressions are fitted
SAMPLED = 20  # records of a source in which each task looks for its fields
SEARCHED = 2_000  # records in which a task looks that found nothing in those
FITTING_FRACTION, DEFAULT_MINUTES = 0.1, 5.0  # of the time of a training, for simple predictors
# Likewise, of the time of tasks that name what an image alone shows; other processes wait, but not over ten minutes.
NETWORK_FRACTION, NETWORK_MINUTES, MAX_NETWORK_MINUTES = 0.5, 1.0, 10.0
MAX_IMAGES, IMAGE_BYTES = 3_000, 2**28  # of a source, that simple predictors are fitted to: ten seconds
COUNTED = 100  # records of a source in which words are counted


def _readable(source: Source, limit: int) -> Iterator[Record]:
    """Yield up to `limit` evenly spaced records without broken ones; the quarantine names these when they are drawn."""
    return filter(None, (unless_broken(source.__getitem__, index) for index in evenly_spaced(len(source), limit)))


def tokenizer_text(recipe: MultimodalRecipe, sources: dict[str, Source], run: RunFolder) -> str:
    """Return tokenizer.json: the checkpoint's, the configured one, or one trained on sources and prompts."""
    # What lies in the run's own folder may be of another recipe, which never had a checkpoint.
    if begun := list_checkpoints(run.checkpoints):
        return (begun[-1] / TOKENIZER_FILE).read_text(encoding="utf-8")
    kept, named = run.path / TOKENIZER_FILE, recipe.modalities.text.tokenizer
    if named is None:
        get_log().info("learning a tokenizer from the sources")
        prompts = [
            text for component in recipe.mixture for prompts in recipe.task(component.task).prompts.values()
            for prompt in prompts
            for text in literal_texts(prompt)
        ]  # fmt: skip
        tasks = [recipe.task(component.task) for component in recipe.mixture]
        slots = (slot for task in tasks for slot in (task.target, *task.inputs.values()))
        read = {slot.name for slot in slots if isinstance(slot, Text)}
        words = (text for s in sources.values() for record in _readable(s, SCANNED) for text in _texts(record, read))
        named = str(kept)
        replace_text(kept, train_tokenizer([*prompts * 20, *words], recipe.vocabulary).to_str())
    try:
        return Path(named).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"modalities.text.tokenizer={named!r} cannot be read: {error}") from None


def _texts(record: Record, read: set[str]) -> Iterator[str]:
    """The texts of a record, those of `extra` that tasks read by these names among them."""
    for key, value in (record.get("extra") or {}).items():
        if read & {key, key.removesuffix("_en"), key.removesuffix("_zh")} and value not in ABSENT:
            yield as_text(value)
    for key in TEXT_KEYS:
        if isinstance(record.get(key), str):
            yield record[key]
    yield from (item["text"] for item in contents_of(record) if item["type"] == "text")
    for key in ("tags_en", "tags_zh"):
        yield ", ".join(record.get(key) or ())
    yield from filter(None, (record.get("categories") or {}).values())
    for name in (*(record.get("numbers") or ()), *(record.get("categories") or ()), *(record.get("series") or ())):
        yield " " + name.replace("_", " ")


def fit_scales(sources: Iterable[Source]) -> Scales:
    """Return location and scale of every number column, from training records alone."""
    columns: dict[str, array[float]] = {}  # a quarter of the memory of lists
    for record in (record for source in sources for record in _readable(source, SCANNED)):
        rows = [record.get("numbers") or {}, *(item["numbers"] for item in contents_of(record) if "numbers" in item)]
        listed = [(name, [value]) for row in rows for name, value in row.items()]
        for name, values in (*listed, *(record.get("series") or {}).items()):
            columns.setdefault(name, array("d")).extend(math.nan if v is None else float(v) for v in values)
    return {name: fit_scale(np.asarray(values)) for name, values in sorted(columns.items())}


def fit_all_series(sources: Iterable[Source]) -> dict[str, SeriesStats]:
    """Return period and logarithm of every column that is read over time, from training windows alone."""
    windows: dict[str, dict[str, list[np.ndarray]]] = {}  # by column and source
    for source in sources:
        for record in _readable(source, SERIES_WINDOWS):
            for name, values in (record.get("series") or {}).items():
                observed = np.asarray([np.nan if v is None else v for v in values], float)
                windows.setdefault(name, {}).setdefault(source.name, []).append(observed)
    for name, found in windows.items():
        if len(found) > 1 and len({fit_series(of_source).period for of_source in found.values()}) > 1:
            get_log().warning(
                f"column {name!r} has a different season in the sources {', '.join(found)}, and forecasts use one for "
                "all of them: give each source a column of its own"
            )
    return {name: fit_series(list(itertools.chain(*found.values()))) for name, found in sorted(windows.items())}


def fit_all_ridges(sources: Iterable[Source], stats: Mapping[str, SeriesStats]) -> dict[str, FittedRidges]:
    """Return the regressions of every column that is read over time, from training windows alone."""
    windows: dict[str, list[NumberSeries]] = {}
    for source in sources:
        for record in _readable(source, RIDGE_WINDOWS if isinstance(source, WindowSource) else 0):
            extra = record["extra"]
            for name, values in record["series"].items():
                # A quarter of the memory of a list.
                packed = array("d", (math.nan if value is None else value for value in values))
                past, future = packed[: extra["context"]], packed[extra["context"] :]
                one = NumberSeries(name, future, past, extra.get("clock"), position=extra["position"])
                windows.setdefault(name, []).append(one)
    found = {name: fit_column(of_column, stats[name]) for name, of_column in sorted(windows.items())}
    return {name: ridges for name, ridges in found.items() if ridges is not None}


def table_predictors(
    recipe: MultimodalRecipe, sources: Mapping[str, Source], run: RunFolder, known: Sequence[TablePredictors] = ()
) -> bytes:
    """Return predictors.safetensors, or nothing: of the checkpoint that the run goes on from, or fitted to the sources.

    Those `known` follow. A source has predictors if a task predicts one of its numbers, or a label, unless those known
    have all its columns and classes. Pairs have none: a row comes back with other partners in later epochs, and would
    be in several folds.
    """
    if checkpoints := list_checkpoints(run.checkpoints):
        kept = checkpoints[-1] / PREDICTORS_FILE
        return kept.read_bytes() if kept.is_file() else b""
    predicted: dict[str, list[Task]] = {}
    kind, networks = recipe.modalities.numbers.predictors, network_seconds(recipe)
    for component in recipe.mixture if kind != "none" else ():
        task, source = recipe.task(component.task), sources.get(component.source)
        fits = (task.output_modality == "numbers" or task.may_be_label) and "series" not in task.inputs
        if fits and not task.chat and source is not None and not isinstance(source, PairSource):
            predicted.setdefault(component.source, []).append(task)
    for name, tasks in list(predicted.items()):
        if own := [table for table in known if name in table.sources]:
            rows, _, labels = predictor_rows(sources[name], tasks, as_features=False)
            if any(covers(table, rows, labels) for table in own):
                del predicted[name]
    minutes = recipe.loop.minutes or DEFAULT_MINUTES
    seconds = {"auto": FITTING_FRACTION * 60 * minutes / max(1, len(predicted)), "ridge": 0.0}
    tables: list[TablePredictors] = []
    for name, tasks in predicted.items():
        began = time.monotonic()
        rows, folds, labels = predictor_rows(sources[name], tasks)
        parts = {column for record in _readable(sources[name], SAMPLED) for column in input_only(record)}
        plan = NetworkPlan(networks.get(name, 0.0) if kind == "auto" else 0.0, recipe.modalities.image)
        if rows and (table := fit_table(rows, np.asarray(folds), seconds[kind], labels, parts, plan)):
            table.sources = [name]
            tables.append(table)
            also = f", networks for {len(table.networks)}" if table.networks else ""
            spent = time.monotonic() - began
            get_log().info(
                f"source {name}: simple predictors of {len(table.numbers)} numbers and {len(table.labels)} labels, "
                f"trees for {len(table.trees)}{also}, fitted to {len(rows):,} records in {spent:.1f} s"
            )
    tables += known
    return to_bytes(tables) if tables else b""


def network_seconds(recipe: MultimodalRecipe) -> dict[str, float]:
    """The time of networks of images of each source: a part of that of its tasks which read images and name a label."""
    seconds = dict[str, float]()
    minutes = min(recipe.loop.minutes or NETWORK_MINUTES, MAX_NETWORK_MINUTES)
    each = NETWORK_FRACTION * 60 * minutes / sum(component.weight for component in recipe.mixture)
    for component in recipe.mixture:
        task = recipe.task(component.task)
        inputs = {slot.modality for slot in task.inputs.values()}
        if task.may_be_label and "image" in inputs:
            seconds[component.source] = seconds.get(component.source, 0.0) + each * component.weight / len(inputs)
    return seconds


def predictor_rows(
    source: Source, tasks: Sequence[Task], as_features: bool = True
) -> tuple[list[dict[str, Any]], list[int], Labels]:
    """Return records as simple predictors see them, what tasks show or ask for, their folds, and their labels.

    Images are their features, which take time, and in rows with a label also themselves; else files.
    """
    shown = any(slot.modality == "image" for task in tasks for slot in task.inputs.values())
    sizes = [len(record.get("image") or b"") for record in _readable(source, SAMPLED) if shown]
    most = min(MAX_IMAGES, IMAGE_BYTES // max(1, int(np.mean(sizes)))) if any(sizes) else MAX_ROWS
    rows, folds, labels = [], [], []
    for index, record in enumerate(_readable(source, most)):
        row, named = dict[str, Any](), dict[str, str]()
        with suppress(DataError):
            for task, language in ((one, name) for one in tasks for name in one.languages(record)[:1]):
                # Where a task shows no other columns, the one that it asks for differs from record to record.
                target = task.build(record, Context(language, np.random.default_rng(index))).target
                row = {**target.options.get("given", {}), **row}
                if target.modality == "numbers":
                    row |= target.raw
                elif "column" in target.options:
                    any_category = isinstance(task.target, Derived) and not pinned(record)
                    named |= categories(record) if any_category else {target.options["column"]: target.raw}
            row |= {name: named[name] for name in categories(record) if name in named}
        image = row.pop(IMAGE, None) if as_features else None
        with suppress(DataError):
            row |= {} if image is None else {IMAGE: image_features(image)} | ({RAW: image} if named else {})
        if row:
            rows.append(row)
            folds.append(fold_of(record))
            labels.append(named)
    return rows, folds, labels


def check_sources(recipe: MultimodalRecipe, sources: Mapping[str, Source]) -> None:
    """Log columns that no task reads and tasks that do not fit every record; refuse sources or tasks without any."""
    for name, config in recipe.sources.items():
        if isinstance(config, TableConfig) and config.test_path is not None:
            try:  # not only after the training
                open_sources(recipe.sources, "test", [name])
            except DataError as error:
                raise DataError(f"source {name!r} cannot be tested: {error}; correct or drop its test_path") from None
    for name in dict.fromkeys(component.source for component in recipe.mixture):
        source, tasks = sources[name], [recipe.task(one.task) for one in recipe.mixture if one.source == name]
        records = list(_readable(source, SAMPLED))
        if not records:
            looked = min(len(source), SAMPLED)
            try:
                source[0]
            except DataError as error:
                raise DataError(
                    f"all of the {looked} records looked at in source {name!r} are broken: {error}"
                ) from None
        for task in tasks:
            found, looked = [record for record in records if task.languages(record)], len(records)
            if not found:  # rare, but perhaps not absent
                more = list(_readable(source, SEARCHED))
                found, looked = [record for record in more if task.languages(record)], len(more)
                records += found[:1]
            if not found and source.columns and task.name in recipe.tasks:
                # Of each text, the column and those in English and Chinese.
                named, known = recipe.tasks[task.name].columns(), {*source.columns}
                known |= {column[:-3] for column in known if column.endswith(("_en", "_zh"))}
                needed = [*named.get("numbers", ()), *named.get("categories", ()), *named.get("extra", ())[::3]]
                check_columns(needed, sorted(known), f"task {task.name}: source {name!r}")
            if not found:
                raise ConfigError(
                    f"task {task.name} finds nothing to read in source {name!r}: "
                    f"map the fields it needs ({task.summary}), or choose another task"
                )
            if len(found) < looked:
                get_log().info(
                    f"{task.name}/{name}: {looked - len(found)} of {looked} records looked at lack a field that the "
                    "task needs; they are skipped for it"
                )
        if unused := unused_columns(source, records, tasks):
            get_log().info(f"source {name}: no task reads the columns {', '.join(map(repr, unused))}")


def trained_tasks(recipe: MultimodalRecipe, sources: dict[str, Source]) -> list[TrainedTask]:
    """Return the tasks of the mixture: lengths of texts, for chats what else messages hold, columns to predict."""
    found = []
    for part in recipe.mixture:
        task, source = recipe.task(part.task), sources[part.source]
        records = _readable(source, COUNTED if task.chat else 0)
        modalities = sorted({item["type"] for record in records for item in contents_of(record)} - {"text"})
        words = words_read(task, source)
        records = _readable(source, COUNTED if task.output_modality == "numbers" else 0)
        columns = sorted({name for record in records for name in _asked_for(record, task)})
        one = TrainedTask(task=part.task, source=part.source, words=words, modalities=modalities, weight=part.weight)
        found.append(one.model_copy(update={"columns": columns}))
    return found


def _asked_for(record: Record, task: Task) -> list[str]:
    """The number columns that the task may ask for: one, if the source names a target and the task obeys it."""
    fixed = pinned(record) if task.optional else None
    return list(predictable(record)) if fixed is None else [fixed]


def words_read(task: Task, source: Source) -> tuple[int, int] | None:
    """Return the min and max of words of the task's inputs in some records; None if it can read none of them."""
    _, counts, _ = build_examples(task, source, COUNTED, (0, "words"), lambda example: word_count(example.source))
    return (min(counts), max(counts)) if counts else None


def open_packer(
    recipe: MultimodalRecipe, sources: Mapping[str, Source], modalities: Modalities, ranks: ProcessGroupContext,
    broken: Path | None,
) -> Packer:  # fmt: skip
    """Return what packs this rank's rows of the mixture; broken records are written to the file `broken`, if named."""
    seed = recipe.loop.seed
    components = [Component(source=sources[x.source], task=x.task, weight=x.weight) for x in recipe.mixture]
    sampler = MixtureSampler(components, seed)
    transform = ExampleTransform(sampler, modalities, seed, recipe.loss_weights, recipe.known_tasks)
    return Packer(transform, recipe.packing, Quarantine(broken, recipe.max_broken), ranks.rank, ranks.size)


def pack_held_out(
    recipe: MultimodalRecipe, modalities: Modalities, ranks: ProcessGroupContext, count: int, choosing: bool = False
) -> list[PackedBatch]:
    """Return this rank's rows of the first `count` batches of the mixture over its test records.

    A source with validation records supplies those instead; tasks whose source has neither are left out. If the loss
    is for `choosing` a model, it is over validation records alone: what is chosen by test records looks too good on
    them. Each row is a data shard, so that rows do not depend on the number of ranks. ConfigError: no source has
    validation or test records; TrainingError: none of them can be used.
    """
    sources = open_sources(recipe.sources, "validation")
    if not choosing:
        test = open_sources(recipe.sources, "test")
        sources = {name: source if len(source) else test[name] for name, source in sources.items()}
    mixture = [component for component in recipe.mixture if len(sources[component.source])]
    if not mixture and choosing:
        raise ConfigError(
            "loop.early_stopping_patience and load_best_model_at_end need validation records and no source of the "
            "mixture has any: add validation_fraction: 0.1 to a source, or leave them out"
        )
    if not mixture:
        raise ConfigError(
            "loop.held_out needs validation or test records and no source of the mixture has any: raise test_fraction, "
            "or leave it out"
        )
    packing = recipe.packing.model_copy(update={"num_shards": recipe.packing.rows})
    # Of few records, one that is broken may be more than the fraction at which a training stops.
    present = recipe.model_copy(update={"mixture": mixture, "packing": packing, "max_broken": 1.0})
    batches = open_packer(present, sources, modalities, ranks, broken=None).batches()
    return [next(batches) for _ in range(count)]
