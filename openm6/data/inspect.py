"""Looks at a user's data before a run: what there is, what its columns hold, what is broken, and a recipe to try."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.errors import DataError
from openm6.data.media import TABLE_ENDINGS, FolderConfig, load_table, media_files, table_config
from openm6.data.propose import (
    Column,
    column_of,
    is_canonical,
    propose_fields,
    propose_tasks,
    recipe_text,
    unused_columns,
)
from openm6.data.records import Record
from openm6.data.source import Source, SourceConfig, Split
from openm6.data.storage import is_remote, refuse_foreign
from openm6.data.table import Table, TableConfig, UnreadableRowError
from openm6.data.windows import WindowsConfig
from openm6.modalities.audio import read_audio
from openm6.modalities.image import read_image
from openm6.tasks.registry import TASKS

SAMPLE = 500  # rows looked at, evenly spread
DECODED = 200  # images and audio clips opened
MAX_PROBLEMS = 20
CONTEXT, HORIZON = 32, 8
MIN_SERIES = 40  # rows from which a series is proposed
TIME_NAMES = frozenset(
    {"time", "date", "datetime", "timestamp", "day", "week", "month", "quarter", "year", "hour", "t"}
)


@dataclass(frozen=True)
class Problem:
    """Something broken: where, and why."""

    where: str
    reason: str


@dataclass
class DataSet:
    """One table or folder: its size, columns, troubles, and the source and tasks proposed for it."""

    name: str
    path: str
    kind: str
    rows: int = 0
    sampled: int = 0
    train: int = 0
    validation: int = 0
    test: int = 0
    columns: list[Column] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unreadable: int = 0  # rows of all that cannot be taken apart
    broken: int = 0  # of the sampled rows, the unreadable ones not among them
    problems: list[Problem] = field(default_factory=list)  # the first MAX_PROBLEMS
    tasks: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def broken_share(self) -> float:
        """Of all rows, estimated from the sample."""
        return (self.unreadable / self.rows if self.rows else 0) + self.broken / max(1, self.sampled)

    def report(self, where: str, reason: object) -> None:
        """Notes something broken; the reason may name the place itself."""
        problem = Problem("" if where in str(reason) else where, str(reason))
        if len(self.problems) < MAX_PROBLEMS and problem not in self.problems:
            self.problems.append(problem)


@dataclass(frozen=True)
class Inspection:
    """Everything found at a path; `recipe` is YAML, or None where nothing can be trained on."""

    path: str
    data_sets: list[DataSet]
    recipe: str | None

    def usable_recipe(self) -> str:
        """The recipe.

        Raises:
            DataError: there is none; the sentence names the first thing that is broken.
        """
        if self.recipe is None:
            problems = [problem for data_set in self.data_sets for problem in data_set.problems]
            reason = problems[0].reason if problems else "no task of openm6 tasks suits its columns"
            raise DataError(f"nothing at {self.path} can be trained on as it is: {reason}")
        return self.recipe


def inspect_path(path: str) -> Inspection:
    """Looks at a table, a folder of tables, or a folder of images or audio clips.

    Raises:
        DataError: nothing at the path can be read.
    """
    found = [data_set for look in _looks(path) for data_set in look()]
    sources = {data_set.name: data_set.source for data_set in found if data_set.tasks}
    tasks = {data_set.name: data_set.tasks for data_set in found if data_set.tasks}
    return Inspection(path, found, recipe_text(sources, tasks) if sources else None)


def _looks(path: str) -> list[Callable[[], list[DataSet]]]:
    """One look for each table or folder of media at a path."""
    place = Path(path).expanduser()
    if is_remote(path) or place.is_file() or "*" in path or "{" in path:
        return [partial(look_at_table, path, None)]
    if not place.is_dir():
        raise DataError(f"there is nothing at {path}: check the path")
    tables = sorted(str(file) for file in place.iterdir() if file.name.lower().endswith(TABLE_ENDINGS))
    if tables:
        return [partial(look_at_table, table, test) for table, test in _with_tests(tables)]
    if media_files(place):
        return [partial(look_at_folder, path)]
    for file in sorted(place.iterdir()):
        if file.is_file():
            refuse_foreign(str(file))
    raise DataError(f"{path} holds no tables ({', '.join(TABLE_ENDINGS)}), images or audio clips")


def _with_tests(tables: Sequence[str]) -> list[tuple[str, str | None]]:
    """Each table with the table of its test rows, where one is named like it (`x-train.csv` and `x-test.csv`)."""
    pairs = []
    for path in tables:
        test = re.sub(r"train(\.\w+)$", r"test\1", path)
        partner = test if test != path and test in tables else None
        if not (re.search(r"test\.\w+$", path) and re.sub(r"test(\.\w+)$", r"train\1", path) in tables):
            pairs.append((path, partner))
    return pairs


def look_at_table(path: str, test_path: str | None) -> list[DataSet]:
    """A table as rows and, where it has dates and numbers, as series too."""
    config = table_config(path)
    data_set = DataSet(name_of(path), path, config.kind)
    try:
        table = load_table(path)
    except DataError as error:
        data_set.report(path, error)
        return [data_set]
    data_set.rows = len(table)
    data_set.unreadable = len(table.unreadable)
    for reason in table.unreadable:
        data_set.report(path, reason)
    data_set.columns = _columns(table, data_set)
    if all(column.kind == "empty" for column in data_set.columns):
        data_set.report(path, "no cell holds anything that can be read")
        return [data_set]
    canonical = is_canonical(table.names)
    fields = None if canonical else propose_fields(data_set.columns)
    proposed = config.model_copy(update={"fields": fields, "test_path": test_path})
    _try_source(data_set, proposed)
    series = _series(data_set, path, table)
    if series is None:
        return [data_set]
    data_set.unused = [name for name in data_set.unused if name not in _columns_of(series)]
    return [data_set, series]


def look_at_folder(path: str) -> list[DataSet]:
    """A folder of images or audio clips, labelled by subfolder."""
    config = FolderConfig(path=path)
    data_set = DataSet(name_of(path), path, config.kind, rows=len(media_files(Path(path).expanduser())))
    records = _try_source(data_set, config)
    keys = dict.fromkeys(key for record in records for key in record)
    shown = [key for key in keys if key not in ("id", "image", "audio")]
    data_set.columns = [column_of(key, [record.get(key) for record in records]) for key in shown]
    return [data_set]


def name_of(path: str) -> str:
    """A source's name from a path: `my data-train.csv` -> `my_data`."""
    stem = re.sub(r"[-_.]?train$", "", Path(path.rstrip("/")).name.split(".")[0])
    return re.sub(r"\W+", "_", stem).strip("_").lower() or "data"


def _columns(table: Table, data_set: DataSet) -> list[Column]:
    """What the columns hold, by a sample of rows; where none can be read, nothing else would say why."""
    rows, reasons = [], []
    for number in _spread(len(table), SAMPLE):
        try:
            rows.append(table.row(number, table.names))
        except UnreadableRowError:  # reported when the table was opened
            continue
        except DataError as error:  # reported where it is read as a record, if any can
            reasons.append(f"{table.place(number)}: {error}")
    if not rows:
        data_set.broken += len(reasons)
        for reason in reasons:
            data_set.report("", reason)
    return [column_of(name, [row.get(name) for row in rows]) for name in table.names]


def _try_source(data_set: DataSet, config: TableConfig | FolderConfig) -> list[Record]:
    """Opens the proposed source as a run would, reads a sample of it, and proposes tasks for what came out."""
    data_set.source = {"kind": config.kind, **config.model_dump(exclude_defaults=True, exclude_none=True)}
    train, test = _open(data_set, config, "train"), _open(data_set, config, "test")
    data_set.train, data_set.test = len(train or ()), len(test or ())
    if any(column.kind == "split" for column in data_set.columns) or isinstance(config, FolderConfig):
        data_set.validation = len(_open(data_set, config, "validation") or ())
    records = [record for source in (train, test) if source is not None for record in _read(data_set, source)]
    data_set.tasks = propose_tasks(records)
    if train is not None:
        data_set.unused = unused_columns(train, records, [TASKS[name] for name in data_set.tasks])
    return records


def _open(data_set: DataSet, config: SourceConfig, split: Split) -> Source | None:
    try:
        return config.open(data_set.name, split, _no_neighbour)
    except DataError as error:
        if split == "train":
            data_set.report(data_set.path, error)
        return None


def _no_neighbour(name: str) -> Source:
    raise DataError(f"there is no other source {name!r} here")


def _read(data_set: DataSet, source: Source) -> list[Record]:
    """A sample of records; images and audio clips are opened as the modalities would."""
    records = []
    decoded = 0
    for index in _spread(len(source), SAMPLE):
        data_set.sampled += 1
        try:
            record = source[index]
        except UnreadableRowError:  # reported when the table was opened
            continue
        except DataError as error:
            data_set.broken += 1
            data_set.report("", error)
            continue
        if decoded < DECODED and ("image" in record or "audio" in record):
            decoded += 1
            if not _decodes(data_set, record):
                continue
        records.append(record)
    return records


def _decodes(data_set: DataSet, record: Record) -> bool:
    try:
        if "image" in record:
            read_image(record["image"])
        if "audio" in record:
            read_audio(record["audio"])
    except DataError as error:
        data_set.broken += 1
        data_set.report(str(record["id"]), error)
        return False
    return True


def _series(data_set: DataSet, path: str, table: Table) -> DataSet | None:
    """The same table as windows over time, where it has a column of times, numbers, and enough rows a series."""
    named = {column.name: column for column in data_set.columns}
    time = next((name for name, column in named.items() if _may_be_time(column)), None)
    numbers = [name for name, column in named.items() if column.kind == "number" and name != time]
    if time is None or not numbers:
        return None
    cells = table.column(time)
    group = None
    if len(set(cells)) < len(cells):
        categories = [name for name, column in named.items() if column.kind in ("category", "identifier")]
        group = next((name for name in categories if _tells_apart(table.column(name), cells)), None)
        if group is None:
            return None
    rows = len(cells) // (len(set(table.column(group))) if group else 1)
    if rows < MIN_SERIES:
        return None
    horizon = min(HORIZON, rows // 20)
    config = WindowsConfig(
        path=path,
        columns=numbers,
        time=time,
        group=group,
        context=CONTEXT * horizon // HORIZON,
        horizon=horizon,
    )
    series = DataSet(f"{data_set.name}_series", path, config.kind, rows=data_set.rows, sampled=data_set.rows)
    series.source = {"kind": config.kind, **config.model_dump(exclude_none=True)}
    train, test = _open(series, config, "train"), _open(series, config, "test")
    series.train, series.test = len(train or ()), len(test or ())
    series.tasks = ["time_series_forecasting"] if train is not None else []
    return series


def _may_be_time(column: Column) -> bool:
    counts = column.kind in ("number", "identifier") and column.name.lower() in TIME_NAMES
    return (column.kind == "date" or counts) and not column.missing


def _tells_apart(group: Sequence[Any], times: Sequence[Any]) -> bool:
    """Whether no time occurs twice in a group."""
    return len(set(zip(group, times, strict=True))) == len(times)


def _columns_of(series: DataSet) -> set[str]:
    source = series.source
    return {*source["columns"], source["time"], source.get("group", "")} if series.tasks else set()


def _spread(length: int, most: int) -> list[int]:
    """At most `most` indices, evenly spread over `length`."""
    return (
        np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)).tolist()
        if length
        else []
    )
