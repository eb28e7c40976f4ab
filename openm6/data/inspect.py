"""Inspection of a user's data before a run: what there is, what its columns hold, what is broken, a recipe to try."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml

from openm6.core.errors import DataError, nearest
from openm6.data import propose
from openm6.data.chat import TURNS, ChatConfig, is_chat
from openm6.data.media import TABLE_ENDINGS, FolderConfig, media_files, table_config
from openm6.data.number_formats import UndecidedMarkError
from openm6.data.records import Record, contents_of
from openm6.data.source import Source, SourceConfig, Split
from openm6.data.storage import is_remote, refuse_foreign
from openm6.data.synthetic import SyntheticSeriesConfig
from openm6.data.table import Table, TableConfig, UnreadableRowError
from openm6.data.text_tables import JsonlConfig
from openm6.data.windows import WindowsConfig
from openm6.modalities.audio import read_audio
from openm6.modalities.image import read_image
from openm6.modalities.series import fit_series
from openm6.tasks.registry import TASKS
from openm6.tasks.slots import Text

SAMPLE = 500  # rows of the sample, at equal distances
DECODED = 200  # images and audio clips opened
MAX_PROBLEMS = 20
_TRAIN = re.compile(r"(?i)train(?=(-(?:\d+|\*)-of-\d+)?(\.\w+)+$)")
HELD_OUT_WORDS = ("test", "validation", "valid", "val", "dev")  # of files; the first that there is holds the test rows
_HELD_OUT = re.compile(rf"(?i)(^|[\W_])({'|'.join(HELD_OUT_WORDS)})(-(?:\d+|\*)-of-\d+)?(\.\w+)+$")
_SHARD = re.compile(r"-(?:\d+|\*)(-of-\d+)(?=(\.\w+)+$)")
# Of a window: steps without a season; with one, seasons of the context; a series has at least so many horizons.
CONTEXT, HORIZON, SEASONS, HORIZONS = 32, 8, 3, 10
MAX_HORIZON = 24
# Of a long series, whose context is up to this fraction of it, and so many steps.
CONTEXT_FRACTION, LONG_CONTEXT = 1 / 12, 64
# For testing and, of series of so many horizons, for the calibration of intervals.
HELD_OUT, CALIBRATED_HORIZONS = 0.1, 20
# Artificial series: their source, the shortest context, windows from which their part is 1, and the largest part.
ARTIFICIAL, MIN_CONTEXT, ENOUGH_WINDOWS, MAX_ARTIFICIAL = "artificial_series", 24, 600, 9.0
# Weights beside predictions of columns, which need most of the time.
WEIGHTS_BESIDE = {"text_to_image": 0.2, "image_captioning": 0.2}
# Passes over all that can be asked of few records, from which a run may learn them by heart: then some are for
# validation, and the run ends early. A run takes about so many tokens, and an example so many without and with media.
MAX_PASSES, VALIDATION_FRACTION, MIN_RECORDS = 100, 0.1, 50
# Tasks of labels, and the validation records that they are given of so many, for the weights of simple predictors.
LABELLED, CALIBRATED, MIN_LABELLED = re.compile("(tabular|record|text)_classification|_categorization"), 150, 500
TOKENS_PER_MINUTE, TOKENS, MEDIA_TOKENS = 500_000, 40, 100
WINDOWS, MAX_ROWS = 50, 1536  # read for the season of a series: windows, of at most so many rows
MIN_SERIES = 40  # rows from which a series is proposed
# What a task predicts that predicts a column of a kind.
OUTPUTS = {"image": "image", "audio": "audio", "number": "numbers", "category": "text", "free text": "text"}
TIME_NAMES = frozenset(
    {"time", "date", "datetime", "timestamp", "day", "week", "month", "quarter", "year", "hour", "t"}
)


@dataclass
class DatasetReport:
    """One table or folder: its size, columns, problems, and the source and tasks proposed for it."""

    name: str
    path: str
    kind: str
    rows: int = 0
    sampled: int = 0
    train: int = 0
    validation: int = 0
    test: int = 0
    columns: list[propose.Column] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unreadable: int = 0  # rows of all that cannot be parsed
    broken: int = 0  # of the sampled rows, the unreadable ones not among them
    problems: list[str] = field(default_factory=list)  # the first MAX_PROBLEMS
    tasks: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)  # settings to read them with

    @property
    def questions(self) -> int:
        """What can be asked of the training records: one thing by each task, or a column."""
        columns = 1 if "target" in self.source else sum(x.kind in ("number", "category") for x in self.columns)
        return self.train * sum(columns if task == "record_regression" else 1 for task in self.tasks)

    @property
    def broken_fraction(self) -> float:
        """Of all rows, estimated from the sample."""
        return (self.unreadable / self.rows if self.rows else 0) + self.broken / max(1, self.sampled)

    def add_problem(self, where: str, reason: object) -> None:
        problem = str(reason) if where in str(reason) else f"{where}: {reason}"
        if len(self.problems) < MAX_PROBLEMS and problem not in self.problems:
            self.problems.append(problem)


@dataclass(frozen=True)
class Inspection:
    """Everything found at a path; `recipe` is YAML, or None if nothing can be trained on."""

    path: str
    datasets: list[DatasetReport]
    recipe: str | None

    def usable_recipe(self) -> str:
        """The recipe; DataError, with the first thing that is broken, if there is none."""
        if self.recipe is None:
            problems = [problem for report in self.datasets for problem in report.problems]
            reason = problems[0] if problems else "no task of openm6 tasks suits its columns"
            raise DataError(f"nothing at {self.path} can be trained on as it is: {reason}")
        return self.recipe


def inspect_path(path: str, minutes: float = 10.0, target: str | None = None, start: str | None = None) -> Inspection:
    """Inspect tables or media at a path and propose a recipe: of some minutes, to predict a `target`, from a `start`.

    DataError: nothing there can be read, or no table has the target.
    """
    reports = _inspect_all(path)
    for number, report in enumerate(reports):
        while report.name in {other.name for other in reports[:number]}:
            report.name += "_2"
    if target is not None:
        _aim_at(reports, target)
    usable = {report.name: report for report in reports if report.tasks}
    stopping = _early_stopping(list(usable.values()), minutes)
    sources = {name: report.source for name, report in usable.items()}
    mixture = [part for report in usable.values() for part in _parts(report)]
    series = [report for report in usable.values() if report.tasks == ["time_series_forecasting"]]
    if made := _artificial_series(series):
        sources[ARTIFICIAL], part = made
        mixture.append(part)
    recipe = {
        "kind": "multimodal",
        "model": {"preset": "nano"} if start is None else {"start": start},
        **_image_settings(list(usable.values()), ("stem", "patch") if start is not None else ()),
        "sources": sources,
        "mixture": mixture,
        "loop": {"steps": "auto", "minutes": int(minutes) if minutes == int(minutes) else minutes, **stopping},
    }
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110)
    return Inspection(path, reports, text if usable else None)


def _aim_at(reports: list[DatasetReport], target: str) -> None:
    """Leave the tasks that predict a column from all others or, if it is no number or category, its modality."""
    names = [x.name for report in reports for x in report.columns]
    if target not in names:
        raise DataError(f"the data have no column {target!r}; {nearest(target, names)}")
    for report in reports:
        kind = next((x.kind for x in report.columns if x.name == target), "empty")
        task = {"number": "record_regression", "category": "record_classification"}.get(kind)
        if task is not None and report.source.get("fields"):
            report.tasks, report.source["target"] = [task], target
        elif target not in report.source.get("columns", ()):
            fitting = [name for name in report.tasks if TASKS[name].output_modality == OUTPUTS.get(kind)]
            # Of a table whose columns are named as keys of records, a label is not what tasks of other texts predict.
            labels = [name for name in fitting if isinstance(slot := TASKS[name].target, Text) and slot.name == "label"]
            report.tasks = labels if target in ("label", "label_zh") else [x for x in fitting if x not in labels]


def _early_stopping(reports: list[DatasetReport], minutes: float) -> dict[str, Any]:
    """Settings that end a run early, if all data have validation records, or are few enough to be given some here."""
    count = sum(len(report.tasks) for report in reports)
    few = {}
    for report in reports:
        media = any(column.kind in ("image", "audio") for column in report.columns) or report.kind == "folder"
        examples = minutes * TOKENS_PER_MINUTE / (MEDIA_TOKENS if media else TOKENS) * len(report.tasks) / count
        few[report.name] = report.train >= MIN_RECORDS and examples >= MAX_PASSES * report.questions
    # Windows of series are few without harm, as artificial ones are mixed in.
    stops = all(x.validation or (few[x.name] and x.kind != "windows") for x in reports)
    for report in reports:
        labelled = report.train >= MIN_LABELLED and any(LABELLED.search(name) for name in report.tasks)
        if not report.validation and (stops or labelled):
            fraction = VALIDATION_FRACTION if stops else round(min(VALIDATION_FRACTION, CALIBRATED / report.train), 3)
            report.source["validation_fraction"] = fraction
            report.validation = round(fraction * report.train)
            report.train -= report.validation
    return {"held_out": {"every": 50}, "early_stopping_patience": 5, "load_best_model_at_end": True} if stops else {}


def _image_settings(reports: list[DatasetReport], fixed: Sequence[str]) -> dict[str, Any]:
    """The section of a recipe about how images are read, as far as sources agree and it is not `fixed`."""
    found = [report.images for report in reports if report.images]
    if not found:
        return {}
    agreed = [name for name in found[0] if name not in fixed and all(name in images for images in found)]
    return {"modalities": {"image": {name: found[0][name] for name in agreed}}}


def _parts(report: DatasetReport) -> list[dict[str, Any]]:
    beside = WEIGHTS_BESIDE if any(name.startswith("record_") for name in report.tasks) else {}
    weights = {name: {"weight": beside[name]} if name in beside else {} for name in report.tasks}
    return [{"source": report.name, "task": name, **weight} for name, weight in weights.items()]


def _artificial_series(reports: list[DatasetReport]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Artificial series and their part of the mixture: the fewer windows, which would be memorised, the more."""
    if not reports:
        return None
    context, horizon = (max(report.source[key] for report in reports) for key in ("context", "horizon"))
    config = SyntheticSeriesConfig(context=max(context, 2 * MIN_CONTEXT), horizon=horizon)
    weight = sum(min(MAX_ARTIFICIAL, max(1.0, ENOUGH_WINDOWS / max(1, report.train))) for report in reports)
    part = {"source": ARTIFICIAL, "task": "time_series_forecasting", "weight": round(weight, 1)}
    return {"kind": config.kind, **config.model_dump(exclude_defaults=True)}, part


def _inspect_all(path: str) -> list[DatasetReport]:
    here = Path(path).expanduser()
    if is_remote(path) or here.is_file() or "*" in path or "{" in path:
        return inspect_table(path, None)
    if not here.is_dir():
        raise DataError(f"there is nothing at {path}: check the path")
    entries = sorted(here.iterdir())
    tables = _joined([str(entry) for entry in entries if entry.name.lower().endswith(TABLE_ENDINGS)])
    if tables:
        # `x-test.csv` holds the test rows of `x-train.csv`, and one that belongs to none is nothing to train on.
        tests = {table: _held_out_beside(table, tables) for table in tables if _TRAIN.search(table)}
        alone = [table for table in tables if not (tests and _HELD_OUT.search(Path(table).name))]
        reports = [report for table in alone for report in inspect_table(table, tests.get(table))]
        unused = [table for table in tables if table not in alone and table not in tests.values()]
        for table in unused if reports else ():
            reports[0].add_problem(
                table,
                "it is not used: a training table has one table of test rows, whose name has test in place of train",
            )
        return reports
    if files := media_files(here):
        config = FolderConfig(path=path)
        report = DatasetReport(name_of(path), path, config.kind, rows=len(files))
        records = _try_source(report, config)
        keys = dict.fromkeys(key for record in records for key in record if key not in ("id", "image", "audio"))
        report.columns = [propose.column_of(key, [record.get(key) for record in records]) for key in keys]
        return [report]
    for entry in entries:
        if entry.is_file():
            refuse_foreign(str(entry))
    raise DataError(f"{path} holds no tables ({', '.join(TABLE_ENDINGS)}), images or audio clips")


def _joined(tables: Sequence[str]) -> list[str]:
    """Tables; those of Parquet that are parts of one become a glob."""
    globs = [_SHARD.sub(r"-*\1", table) if table.lower().endswith(".parquet") else table for table in tables]
    counts = Counter(globs)
    return list(dict.fromkeys(own if counts[own] > 1 else table for own, table in zip(globs, tables, strict=True)))


def _held_out_beside(table: str, tables: Sequence[str]) -> str | None:
    """The table with the test rows of a training table, or a glob of its parts, by their names in small letters."""
    for name in (_TRAIN.sub(word, table.lower()) for word in HELD_OUT_WORDS):
        alike = [other for other in tables if other.lower() == name]
        # The training rows may be in more or fewer parts.
        alike = alike or [other for other in tables if _SHARD.sub("", other.lower()) == _SHARD.sub("", name)]
        if alike:
            return alike[0] if len(alike) == 1 else _SHARD.sub(r"-*\1", alike[0])
    return None


def inspect_table(path: str, test_path: str | None) -> list[DatasetReport]:
    """A table as rows and, if it has dates and numbers, as series too."""
    config = table_config(path)
    report = DatasetReport(name_of(path), path, config.kind)
    try:
        config, table = _load(report, config)
    except DataError as error:
        report.add_problem(path, error)
        return [report]
    if isinstance(config, JsonlConfig) and is_chat(table.names):
        config = ChatConfig(path=path)
        report.kind = config.kind
    report.rows = len(table)
    report.unreadable = len(table.unreadable)
    for reason in table.unreadable:
        report.add_problem(path, reason)
    report.columns = _columns(table, report)
    if all(column.kind == "empty" for column in report.columns):
        report.add_problem(path, "no cell holds anything that can be read")
        return [report]
    if not isinstance(config, ChatConfig) and any(x.name in TURNS and x.kind == "list" for x in report.columns):
        report.add_problem(path, "it may hold chats, which are read from JSON Lines alone: export them as .jsonl")
    fields = None if isinstance(config, ChatConfig) else propose.propose_fields(report.columns)
    _try_source(report, _with_test_table(report, config.model_copy(update={"fields": fields}), test_path))
    series = _series(report, table)
    if series is None:
        return [report]
    if series.tasks:
        used = {*series.source["columns"], series.source["time"], series.source.get("group")}
        report.unused = [name for name in report.unused if name not in used]
    return [report, series]


def _load(report: DatasetReport, config: TableConfig) -> tuple[TableConfig, Table]:
    """The table and the config that reads it; if a decimal mark stays open, it is that of most cells."""
    table = config.load(config.path)
    try:
        table.read(table.names)
    except UndecidedMarkError as error:
        report.add_problem(config.path, f"{error}; the proposed one has that of most cells, {error.likely!r}")
        return _load(report, config.model_copy(update={"decimal": error.likely}))
    return config, table


def _with_test_table(report: DatasetReport, config: TableConfig, test_path: str | None) -> TableConfig:
    """The config with a second table of test rows, unless that cannot be read: it may lack what is predicted."""
    tested = config.model_copy(update={"test_path": test_path})
    try:
        if test_path is not None:
            tested.open(report.name, "test", _no_neighbour)
    except DataError as error:
        report.add_problem(test_path or "", f"it is not used for testing: {error}")
        return config
    return tested


def name_of(path: str) -> str:
    """A source's name from a path: `my data-train.csv` -> `my_data`."""
    stem = re.sub(r"(?i)[-_.]?train(-(?:\d+|\*)-of-\d+)?$", "", Path(path.rstrip("/")).name.split(".")[0])
    return re.sub(r"\W+", "_", stem).strip("_").lower() or "data"


def _columns(table: Table, report: DatasetReport) -> list[propose.Column]:
    """What the columns hold, by a sample of rows; if none can be read, nothing else would say why."""
    rows, reasons = [], []
    for index in _evenly(len(table), SAMPLE):
        try:
            rows.append(table.row(index, table.names))
        except UnreadableRowError:  # reported when the table was opened
            continue
        except DataError as error:  # reported when it is read as a record, if any can
            reasons.append(f"{table.row_name(index)}: {error}")
    if not rows:
        report.broken += len(reasons)
        for reason in reasons:
            report.add_problem("", reason)
    columns = [propose.column_of(name, [row.get(name) for row in rows]) for name in table.names]
    return [replace(x, summary=f"{x.summary} ({unit})") if (unit := table.units.get(x.name)) else x for x in columns]


def _try_source(report: DatasetReport, config: TableConfig | FolderConfig) -> list[Record]:
    """Open the proposed source as a run would, read a sample of it, and propose tasks for what came out."""
    report.source = {"kind": config.kind, **config.model_dump(exclude_defaults=True, exclude_none=True)}
    # A hash leaves nothing for validation.
    named = isinstance(config, FolderConfig) or any(column.kind == "split" for column in report.columns)
    sources = _open(report, config, get_args(Split) if named else ("train", "test"))
    records = [record for split in ("train", "test") if split in sources for record in _read(report, sources[split])]
    report.tasks = propose.propose_tasks(records)
    if any("image" in TASKS[name].inputs for name in report.tasks) and any("image" in record for record in records):
        report.images = propose.propose_images(records)
    if "train" in sources:
        report.unused = propose.unused_columns(sources["train"], records, [TASKS[name] for name in report.tasks])
    return records


def _open(report: DatasetReport, config: SourceConfig, splits: Sequence[Split]) -> dict[Split, Source]:
    """The splits that open, with the number of their records noted."""
    opened = {}
    for split in splits:
        try:
            opened[split] = config.open(report.name, split, _no_neighbour)
        except DataError as error:
            if split == "train":
                report.add_problem(report.path, error)
    report.train, report.validation, report.test = (len(opened.get(split, ())) for split in get_args(Split))
    return opened


def _read(report: DatasetReport, source: Source) -> list[Record]:
    """A sample of records; images and audio clips are opened as the modalities would."""
    records = []
    sample = _evenly(len(source), SAMPLE)
    decoded = {sample[position] for position in _evenly(len(sample), DECODED)}
    broken = 0  # of those
    for index in sample:
        report.sampled += 1
        where = ""
        try:
            record = source[index]
            where = str(record["id"])
            records.append(record)
            if index in decoded and (error := _broken_media(record)):
                records.pop()
                broken += 1
                report.add_problem(where, error)
        except UnreadableRowError:  # reported when the table was opened
            continue
        except DataError as error:
            report.broken += 1
            report.add_problem(where, error)
    report.broken += round(broken * len(sample) / max(1, len(decoded)))
    return records


def _broken_media(record: Record) -> DataError | None:
    """Why an image or audio clip of a record cannot be opened."""
    try:
        for item in (record, *contents_of(record)):
            if "image" in item:
                read_image(item["image"])
            if "audio" in item:
                read_audio(item["audio"])
    except DataError as error:
        return error
    return None


def _series(rows: DatasetReport, table: Table) -> DatasetReport | None:
    """The same table as windows over time, if it has a column of times, numbers, and enough rows per series."""
    time = next((column.name for column in rows.columns if _may_be_time(column)), None)
    numbers = [x.name for x in rows.columns if (x.kind == "number" or x.coded) and x.name != time]
    if time is None or not numbers:
        return None
    readable = len(table) - len(table.unreadable)  # the others come last
    # As texts, since some may be lists.
    cells = list(map(str, table.column(time)[:readable]))
    group, count = None, 1
    if len(set(cells)) < len(cells):
        # In a column that separates the series, no time occurs twice in a group; the groups of an identifier are short.
        for column in rows.columns:
            found = table.column(column.name)[:readable] if column.kind in ("category", "identifier") else []
            groups = list(map(str, found))
            count = len(set(groups))
            long = len(cells) >= MIN_SERIES * count
            if groups and long and len(set(zip(groups, cells, strict=True))) == len(cells):
                group = column.name
                break
        else:
            return None
    numbers = [name for name in numbers if name != group]
    length = len(cells) // count
    if length < MIN_SERIES or not numbers:
        return None
    decimal = rows.source.get("decimal")
    config = WindowsConfig(
        path=rows.path, columns=numbers, time=time, decimal=decimal, group=group, context=1, horizon=1
    )
    context, horizon = _window_shape(config, length)
    # A test window needs a horizon of rows.
    shape: dict[str, Any] = {"context": context, "horizon": horizon}
    shape["test_fraction"] = HELD_OUT if HELD_OUT * length >= horizon + 1 else 2 * HELD_OUT
    if length >= CALIBRATED_HORIZONS * horizon:
        shape["validation_fraction"] = HELD_OUT
    config = config.model_copy(update=shape)
    series = DatasetReport(f"{rows.name}_series", rows.path, config.kind, rows=rows.rows, sampled=rows.rows)
    described = {key: value for key, value in config.model_dump(exclude_none=True).items() if value != []}
    series.source = {"kind": config.kind, **described}
    series.tasks = ["time_series_forecasting"] if "train" in _open(series, config, get_args(Split)) else []
    return series


def _window_shape(config: WindowsConfig, length: int) -> tuple[int, int]:
    """Context and horizon for series of so many rows: a season ahead from three of them, if there is one."""
    rows = min(length * 3 // 4, MAX_ROWS)
    shape = {"context": rows - rows // 3, "horizon": rows // 3, "stride": max(1, (length - rows) // WINDOWS)}
    whole = config.model_copy(update={**shape, "test_fraction": 0.0})
    try:
        records = _read(DatasetReport("", "", ""), whole.open("series", "train", _no_neighbour))
    except DataError:  # reported when the windows are opened
        records = []
    windows = [np.array(values, float) for record in records[:WINDOWS] for values in record["series"].values()]
    period = fit_series(windows).period
    longest = max(2, length // HORIZONS)
    horizon = min(period if 4 <= period <= MAX_HORIZON else HORIZON, longest)
    long = min(LONG_CONTEXT, int(CONTEXT_FRACTION * length))
    context = max(CONTEXT * horizon // HORIZON if period == 1 else 0, SEASONS * period, CONTEXT, long)
    return min(context, length // 2 - horizon), horizon


def _no_neighbour(name: str) -> Source:
    raise DataError(f"there is no other source {name!r} here")


def _may_be_time(column: propose.Column) -> bool:
    counts = column.kind in ("number", "identifier") and column.name.lower() in TIME_NAMES
    return (column.kind == "date" or counts) and not column.missing


def _evenly(length: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)).tolist()
