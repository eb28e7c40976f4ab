"""Tables and series in pandas: predictions of a column of a DataFrame, and forecasts in the form of Chronos."""

# Shapes: N rows, K classes, S series, H steps ahead, Q quantile levels

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from openm6.api.times import frequency, read_times, same_times, times_ahead
from openm6.core.errors import ConfigError, DataError, MissingColumnError, nearest
from openm6.data.records import COLUMN_KEYS, Fields, Record, RowReader, check_columns
from openm6.data.table import ArrowTable
from openm6.data.windows import WindowsConfig, clock_of
from openm6.evaluate.answers import answer, class_scores
from openm6.evaluate.run import source_configs
from openm6.inference.load import LoadedModel
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.histogram import Histogram
from openm6.models.description import TrainedTask
from openm6.tasks.own import AnyText, SomeNumbers, for_number
from openm6.tasks.slots import Derived, Text, hold_out_category
from openm6.tasks.task import Example, Task

if TYPE_CHECKING:
    import pandas as pd


class TableError(DataError, ValueError):
    """Columns, rows or series that cannot be used; scikit-learn and Chronos raise a ValueError."""


class MixedTypesError(DataError, TypeError):
    """A column of several types, or of one that cannot be read; scikit-learn expects a TypeError."""


@contextmanager
def as_table_error() -> Iterator[None]:
    """Raise an error of the data as a TableError, unless it is a ValueError or TypeError by itself."""
    try:
        yield
    except DataError as error:
        raise error if isinstance(error, ValueError | TypeError) else TableError(str(error)) from None


LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
UNKNOWN = "?"
UNREADABLE = (pa.ArrowException, TypeError, ValueError, OverflowError)  # what Arrow raises about cells


def predict(
    loaded: LoadedModel, frame: pd.DataFrame, target: str, levels: Sequence[float], classes: Sequence[Any] | None
) -> pd.DataFrame:
    target, classes = str(target), None if classes is None else list(classes)  # pandas has numbers as names
    columns = columns_of(frame)
    if not columns or not len(frame):
        raise DataError("a DataFrame with at least one row, and columns with names of their own, is needed")
    if classes == []:
        raise ConfigError("classes must name at least one class")
    table = arrow_table(columns, "the DataFrame")
    check_levels(levels)
    numeric, known = target in loaded.numbers.scales, {*loaded.numbers.scales}
    configs = source_configs(loaded.description.sources, str(loaded.checkpoint))
    failure: DataError | None = None
    trained = trained_for(loaded, "numbers" if numeric else "text")
    # Of own data first, and of sources whose columns are known.
    for one in sorted(trained, key=lambda x: (x.of_start, getattr(configs.get(x.source), "fields", None) is None)):
        task, config = loaded.tasks[one.task], configs.get(one.source)
        own, task_fields = getattr(config, "fields", None), getattr(config, "task_fields", None)
        fields = own or _fields(table.names, loaded, target)
        mapped = {*(fields.numbers or ()), *(fields.categories or ())}
        known |= {name for name in (fields.label, fields.label_zh, *mapped) if name and own}
        if isinstance(task.target, SomeNumbers | AnyText):
            # An own task predicts one column, and shows the others.
            fits = target in (task.target.columns if isinstance(task.target, SomeNumbers) else (task.target.name,))
        else:
            labelled = isinstance(task.target, Text) and task.target.name == "label"
            labelled = labelled and target in (fields.label, fields.label_zh)
            fits = labelled or (target in mapped and (numeric or task.optional))
            fits = fits and _fixed_column(task, config) in (None, target)
        if not fits or (failure and own is None):
            continue
        try:
            records = frame_records(table, fields, target, task_fields)
            spell_as_trained(loaded, records)
        except MissingColumnError as error:  # another source may have others
            failure = failure or error
            continue
        found: dict[str, Any] = {}
        key = "label" if fields.label == target else "label_zh"
        source = one.source if own else ""  # without a mapping, it may be another one
        if numeric:
            answers = number_answers(loaded, task, records, target, source)
            for name, level in [("predictions", 0.5), *((str(level), level) for level in levels)]:
                found[name] = [math.nan if one is None else one.quantile(level)[0] for one in answers]
        elif classes is not None:
            spelt = [_spelling(loaded, str(name), (), target) for name in classes]
            probability = class_probabilities(loaded, task, records, target, spelt, key, source)
            best = np.nan_to_num(probability).argmax(1)
            asked = ~np.isnan(probability[:, 0])
            found["predictions"] = [classes[one] if able else None for one, able in zip(best, asked, strict=True)]
            found |= {str(name): probability[:, index] for index, name in enumerate(classes)}
        else:
            labels = [x.labels[target] for x in loaded.numbers.predictors if target in x.labels_of(source)]
            examples = _without_category(task, records, target, labels[0].classes if labels else (), key)
            sourced = [example.of_source(source) for example in examples.values()]
            texts = dict(zip(examples, answer(loaded, sourced, MaskedSampling()), strict=True))
            found["predictions"] = [texts.get(row) for row in range(len(records))]
        return type(frame)(found, index=frame.index)
    raise failure or DataError(f"the model predicts no column {target!r}; {nearest(target, sorted(known - {target}))}")


def _fixed_column(task: Task, config: Any) -> str | None:
    """The one column that a task asks for, or that a source has as its target; None if it is drawn."""
    if task.optional:
        return getattr(config, "target", None)
    return getattr(getattr(task.target, "build", None), "keywords", {}).get("column")


def check_levels(levels: Sequence[float]) -> None:
    """Raise ConfigError if a quantile level lies outside 0 and 1."""
    if isinstance(levels, float | int):
        raise ConfigError(f"quantile_levels={levels} must be a list, as [{levels}]")
    if not all(isinstance(level, float | int | np.number) and 0 < level < 1 for level in levels):
        raise ConfigError(f"quantile_levels={list(levels)} must lie between 0 and 1")


def trained_for(loaded: LoadedModel, output: str) -> list[TrainedTask]:
    """Return the trained tasks with this output that are no forecasts, those with the most inputs first."""
    named = [(one, loaded.tasks[one.task]) for one in loaded.description.trained_tasks if one.task in loaded.tasks]
    plain = [(one, task) for one, task in named if task.output_modality == output and not task.contrastive]
    plain = [(one, task) for one, task in plain if not task.chat and "series" not in task.inputs]
    return [one for one, _ in sorted(plain, key=lambda pair: -len(pair[1].inputs))]


def columns_of(frame: Any) -> dict[str, Any]:
    """Return the columns of a DataFrame by name; none if it is no DataFrame, or two have one name."""
    names = list(map(str, getattr(frame, "columns", ()))) if getattr(frame, "iloc", None) is not None else []
    return {name: frame.iloc[:, index] for index, name in enumerate(names)} if len(set(names)) == len(names) else {}


def arrow_table(columns: Mapping[str, Any], where: str) -> ArrowTable:
    """Return columns as a table; raise MixedTypesError if one cannot be read."""
    arrays = {}
    for name, cells in columns.items():
        if any(isinstance(cell, Path) for cell in cells):
            cells = [str(cell) if isinstance(cell, Path) else cell for cell in cells]
        try:
            arrays[name] = _arrow_array(cells)
        except UNREADABLE:
            kinds = sorted({type(cell).__name__ for cell in cells})
            wrong = "several types", "each argument must be a string or a number, as the others of its column"
            if len(kinds) == 1:
                wrong = "a type that cannot be read", "convert them to strings or numbers"
            raise MixedTypesError(
                f"column {name!r} of {where} holds values of {wrong[0]} ({', '.join(kinds)}): {wrong[1]}"
            ) from None
    return ArrowTable(pa.table(arrays), where)


def _arrow_array(cells: Any) -> pa.Array:
    try:
        return pa.array(cells, from_pandas=True)
    except UNREADABLE:
        return pa.array(np.asarray(cells, object), from_pandas=True)  # a sparse column of pandas


def _fields(names: Sequence[str], loaded: LoadedModel, target: str) -> Fields:
    """What fills a record if the training used the keys of records: the model's numbers, and other columns."""
    every = [*names, *([] if target in names else [target])]
    keys = {key: key for key in COLUMN_KEYS if key in every}
    numbers = [name for name in every if name in loaded.numbers.scales]
    categories = [name for name in every if name not in numbers and name not in keys]
    return Fields(**keys, numbers=numbers or None, categories=categories or None)


def frame_records(table: ArrowTable, fields: Fields, target: str, task_fields: Fields | None = None) -> list[Record]:
    """Return the rows of a table as records, with columns of own tasks; the target column may be absent.

    Raises:
        DataError: another column is absent, or a cell does not fit; the sentence names the row.
    """
    if target not in table.names:
        table = ArrowTable(table.arrow.append_column(target, pa.nulls(len(table))), table.where)
    reader = RowReader(table.names, fields, read_file, table.where, task_fields)
    records = []
    for row in range(len(table)):
        try:
            records.append(reader.read(table.row(row, list(reader.columns))))
        except DataError as error:
            raise DataError(f"row {row} of {table.where}: {error}") from None
    return records


def read_file(name: str, limit: int) -> bytes:
    """Return the content of a file that a cell names; raise DataError if it cannot be read or is too large."""
    try:
        with Path(name).expanduser().open("rb") as file:
            content = file.read(limit + 1)
    # A path with a zero byte is a ValueError, a home that is not known a RuntimeError.
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name} cannot be read ({getattr(error, 'strerror', None) or error}): check the path"
        ) from None
    if len(content) > limit:
        raise DataError(f"{name} is larger than {limit:,} bytes, the most allowed: shrink or cut it")
    return content


def spell_as_trained(loaded: LoadedModel, records: Sequence[Record]) -> None:
    """Give categories the words of the training: pandas reads `1` as 1.0 beside an empty cell, and `true` as True."""
    for record in records:
        named = record.get("categories") or {}
        for column, word in named.items():
            if word is not None:
                named[column] = _spelling(loaded, word, (column,))


def _spelling(loaded: LoadedModel, word: str, columns: Sequence[str], target: str = "") -> str:
    """The trained word that is alike, of a category or of the classes of a label; the word itself if there is none."""
    tables = loaded.numbers.predictors
    known = [words for table in tables for name in columns if (words := table.categories.get(name)) is not None]
    known += [table.labels[target].classes for table in tables if target in table.labels]
    if any(word in words for words in known):
        return word
    return next((one for words in known for one in words if _plain(one) == _plain(word)), word)


def _plain(word: str) -> str:
    return word.lower().removesuffix(".0")


def number_answers(
    loaded: LoadedModel, task: Task, records: Sequence[Record], target: str, source: str = ""
) -> list[Histogram | None]:
    """Return the distribution of a column for each record, of a source if it is known; None without what is needed."""
    # Any value will do where it is missing: only its distribution is asked for.
    pairs = [(record, record.get("numbers") or {}) for record in records]
    asked = [{**record, "numbers": {**own, target: own.get(target) or 0.0}} for record, own in pairs]
    examples = _examples(task, for_number(task, target), asked, asked)
    answers = answer(loaded, [example.of_source(source) for example in examples.values()], MaskedSampling())
    by_row = {row: found for row, found in zip(examples, answers, strict=True) if isinstance(found, Histogram)}
    return [by_row.get(row) for row in range(len(records))]


def class_probabilities(
    loaded: LoadedModel,
    task: Task,
    records: Sequence[Record],
    target: str,
    classes: Sequence[str],
    key: str = "label",
    source: str = "",
) -> np.ndarray:
    """Return probabilities of classes by the likelihoods of their names, NaN if a record cannot be asked.  # N K"""
    examples = _without_category(task, records, target, classes, key)
    found = np.full((len(records), len(classes)), np.nan)
    if examples:
        sourced = [example.of_source(source) for example in examples.values()]
        found[list(examples)] = np.exp(class_scores(loaded, sourced, classes))
    return found


def _without_category(
    task: Task, records: Sequence[Record], target: str, classes: Sequence[str], key: str
) -> dict[int, Example]:
    """Those records as examples that ask for a category and do not show it; `key` is that of a label."""
    own = isinstance(task.target, AnyText)
    if not (own or task.optional):
        labels = {"label", "label_zh"}
        asked = [{k: v for k, v in record.items() if k not in labels} | {key: UNKNOWN} for record in records]
        return _examples(task, task, asked, asked)
    asked, shown = [], []
    for record in records:
        named = record.get("categories") or {}
        true, kept = named.get(target), record
        if not own:  # a text may be the label
            kept = {k: v for k, v in record.items() if true is None or v != true} | {"label": UNKNOWN}
        asked.append({**kept, "categories": {**named, target: UNKNOWN}})
        # Prompts were in the language of the categories, of which the hidden one may be the only one.
        guess = true or (classes[0] if classes else target)
        shown.append({**kept, "categories": {**named, target: guess}})
    if own:
        return _examples(task, task, asked, asked)
    pinned = Derived("text", partial(hold_out_category, column=target), lambda *_: True)
    return _examples(task, replace(task, target=pinned), asked, shown)


def _examples(task: Task, pinned: Task, records: Sequence[Record], shown: Sequence[Record]) -> dict[int, Example]:
    """Those records as examples that have what the task needs, by their rows, in the language of its training.

    shown: the records with what is asked for, by which the training chose the language
    """
    found = {}
    for row, (record, whole) in enumerate(zip(records, shown, strict=True)):
        if languages := task.languages(whole) or pinned.languages(record):
            language = "en" if "en" in languages else languages[0]
            found[row] = pinned.example(record, np.random.default_rng(0), language=language)
    return found


@dataclass(frozen=True)
class _Series:
    """One target of one item: its past, covariates beside it and beyond, and the times of the steps ahead."""

    item: Any
    target: str
    past: list[float]
    covariates: dict[str, list[float]]
    clock: list[float] | None  # seconds of the past and of the steps ahead
    ahead: Any


def forecast(
    loaded: LoadedModel,
    frame: pd.DataFrame,
    future: pd.DataFrame | None,
    names: tuple[str, str],
    targets: Sequence[str],
    length: int | None,
    levels: Sequence[float],
    batch_size: int,
    context_length: int | None,
    validate: bool,
    freq: str | None,
) -> pd.DataFrame:
    """As `OpenM6.forecast`; `names` are those of the columns of items and of times."""
    # optional, and slow to import
    import pandas as pd  # noqa: PLC0415

    check_levels(levels)
    if not targets or not columns_of(frame):
        raise DataError("a DataFrame with columns of names of their own, and at least one target, are needed")
    trained, config = _forecasting(loaded, targets)
    length = config.horizon if length is None else length
    context = config.context if context_length is None else context_length
    if length < 1 or context < 1 or batch_size < 1:
        raise ConfigError("prediction_length, context_length and batch_size must be at least 1")
    series = list(_all_series(pd, frame, future, names, targets, length, config, freq, validate))
    quantiles = np.full((len(series), length, len(levels)), np.nan)
    points = np.full((len(series), length), np.nan)
    for start in range(0, length, config.horizon):
        ahead = min(config.horizon, length - start)
        examples = []
        for one, before in zip(series, points, strict=True):
            values = [*one.past, *before[:start].tolist()]
            first = max(0, len(values) - context)
            # Every step ahead is asked for by some value.
            shown = {one.target: [*values[first:], *[0.0] * ahead]}
            shown |= {name: cells[first : len(values) + ahead] for name, cells in one.covariates.items()}
            extra: dict[str, Any] = {"context": len(values) - first, "horizon": ahead}
            extra |= {"past_covariates": config.past_covariates, "known_covariates": config.known_covariates}
            if config.time is not None and one.clock is not None:
                extra["clock"] = clock_of(np.asarray(one.clock[first : len(values) + ahead]))
            plain = {key: [None if math.isnan(x) else x for x in cells] for key, cells in shown.items()}
            record = {"id": f"{one.item}/{start}", "series": plain, "extra": extra}
            examples.append(loaded.tasks[trained.task].example(record, np.random.default_rng(0), language="en"))
        batches = [examples[first : first + batch_size] for first in range(0, len(examples), batch_size)]
        answers = [one for batch in batches for one in answer(loaded, batch, MaskedSampling())]
        for index, histogram in enumerate(answers):
            assert isinstance(histogram, Histogram)
            points[index, start : start + ahead] = histogram.median()
            for number, level in enumerate(levels):
                quantiles[index, start : start + ahead, number] = histogram.quantile(level)
    tables = [pd.DataFrame({names[0]: one.item, names[1]: one.ahead, "target_name": one.target}) for one in series]
    found = pd.concat(tables, ignore_index=True)
    found["predictions"] = points.ravel().astype(np.float32)
    for index, level in enumerate(levels):
        found[str(level)] = quantiles[:, :, index].ravel().astype(np.float32)
    return found


def _forecasting(loaded: LoadedModel, targets: Sequence[str]) -> tuple[TrainedTask, WindowsConfig]:
    """The trained task that forecasts these columns, and its windows."""
    configs, columns = source_configs(loaded.description.sources, str(loaded.checkpoint)), []
    for one in loaded.description.trained_tasks:
        config, task = configs.get(one.source), loaded.tasks.get(one.task)
        if isinstance(config, WindowsConfig) and task is not None and task.output_modality == "numbers":
            if set(targets) <= set(config.columns):
                return one, config
            columns += config.columns
    raise DataError(f"the model forecasts no series {', '.join(map(repr, targets))}; {nearest(targets[0], columns)}")


def _all_series(
    pd: Any, frame: Any, future: Any, names: tuple[str, str], targets: Sequence[str], length: int,
    config: WindowsConfig, freq: str | None, validate: bool,
) -> Iterator[_Series]:  # fmt: skip
    """The series of a long DataFrame, in the order of the items' first rows."""
    known, beside = config.known_covariates, [*config.past_covariates, *config.known_covariates]
    check_columns([*names, *targets, *beside], list(frame.columns), "df")
    if not len(frame):
        raise DataError("df has no rows: nothing can be forecast")
    if known and future is None:
        raise DataError(f"the model was trained with {', '.join(known)} of the steps ahead: add future_df with them")
    if frame[names[0]].isna().any():
        raise DataError(f"df has rows without {names[0]!r}: fill or drop them")
    # Written dates have another order than their times.
    past, beside_past = frame[names[1]], list(future[names[1]]) if known and names[1] in future else []
    frame = frame.assign(**{names[1]: read_times(pd, past, config.time_format, beside_past)})
    if future is not None and validate:
        _check_future(frame, future, names, targets)
    if known:
        check_columns([*names, *known], list(future.columns), "future_df")
        future = future.assign(**{names[1]: read_times(pd, future[names[1]], config.time_format, list(past))})
    items = [(item, rows.sort_values(names[1])) for item, rows in frame.groupby(names[0], sort=False, observed=True)]
    shared = {frequency(pd, list(rows[names[1]].dropna())) for _, rows in items} - {None}
    for item, rows in items:
        where = f"item {item!r}"
        times, ahead = times_ahead(pd, list(rows[names[1]]), length, freq, shared, where)
        if len(times) > len(rows):  # what was not recorded has no value
            rows = rows.set_index(names[1]).reindex(times)
        later = None
        if known:
            later = future[future[names[0]] == item].sort_values(names[1])
            if len(later) != length or (validate and not same_times(list(later[names[1]]), ahead)):
                raise DataError(f"{where}: future_df must hold the {length} steps from {ahead[0]} to {ahead[-1]}")
        cells = {name: _floats(pd, rows[name], where) for name in [*targets, *beside]}
        if later is not None:
            cells |= {name: [*cells[name], *_floats(pd, later[name], where)] for name in known}
        dated = isinstance(times[0], pd.Timestamp)
        clock = [time.timestamp() for time in (*times, *ahead)] if dated else None
        for target in targets:
            if all(map(math.isnan, cells[target])):
                raise DataError(f"{where} has no value of {target!r}: drop it, or fill the column")
            # What is not known of the steps ahead is missing there.
            covariates = {name: [*cells[name], *[math.nan] * length][: len(times) + length] for name in beside}
            yield _Series(item, target, cells[target], covariates, clock, ahead)


def _check_future(frame: Any, future: Any, names: tuple[str, str], targets: Sequence[str]) -> None:
    """Raise DataError if what is known ahead has other columns or items than the past, or a target."""
    if not columns_of(future):
        raise DataError("future_df must be a DataFrame with columns of names of their own")
    check_columns(names, list(future.columns), "future_df")
    for name in future.columns:
        if name in targets or name not in frame.columns:
            reason = "is forecast" if name in targets else "is not in df"
            raise DataError(f"future_df has the column {name!r}, which {reason}: drop it there")
    if set(future[names[0]]) != set(frame[names[0]]):
        item = next(iter(set(future[names[0]]) ^ set(frame[names[0]])))
        raise DataError(f"df and future_df must have the same items, and {item!r} is in one alone: add or drop it")


def _floats(pd: Any, cells: Any, where: str) -> list[float]:
    if not pd.api.types.is_numeric_dtype(cells):
        raise DataError(f"column {cells.name!r} of {where} holds {cells.dtype} where numbers are expected: convert it")
    values = cells.to_numpy(float, na_value=math.nan)
    if np.isinf(values).any():
        raise DataError(f"column {cells.name!r} of {where} holds infinite values: leave them empty")
    return values.tolist()
