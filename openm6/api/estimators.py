"""Training in Python: estimators for scikit-learn, and `finetune`, from a model and data to a model."""

# Shapes: N rows, F columns, K classes, Q quantile levels

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data

from openm6.api import frames
from openm6.api.frames import TableError
from openm6.api.model import OpenM6, load
from openm6.checkpoint.folder import list_checkpoints
from openm6.core.config import read_yaml
from openm6.core.errors import ConfigError, DataError, OpenM6Error
from openm6.core.run_folder import RunFolder
from openm6.data.inspect import inspect_path
from openm6.data.propose import column_of
from openm6.data.records import MAX_AUDIO_BYTES, MAX_IMAGE_BYTES, Fields, as_bytes, is_no_class
from openm6.tasks.slots import SHORT
from openm6.train.run import recipe_path, train_values

if TYPE_CHECKING:
    import pandas as pd

# Kinds of columns that are no input by themselves: nothing to read, or a name of the row.
LEFT_OUT = ("empty", "identifier")
LIMITS = {"image": MAX_IMAGE_BYTES, "audio": MAX_AUDIO_BYTES}
MAX_SEED = 2**31 - 1
FEW_STEPS = 200
SOURCE = "table"
# Rows from which some are for validation in a training of a given time, and the fraction of them.
MIN_VALIDATED, VALIDATION = 50, 0.1


class _TableEstimator(BaseEstimator):
    _task: str

    def __init__(
        self,
        base: str | None = None,
        time_limit: float = 60.0,
        max_steps: int | None = None,
        model: Mapping[str, Any] | None = None,
        device: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.base = base
        self.time_limit = time_limit
        self.max_steps = max_steps
        self.model = model
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.categorical = True
        # How many steps fit into a time is never the same.
        tags.non_deterministic = self.max_steps is None
        return tags

    @property
    def _is_short(self) -> bool:
        """Whether training is too short for predictions to be good."""
        return self.max_steps is not None and self.max_steps < FEW_STEPS

    def _table(self, X: Any, y: Any = None, reset: bool = False) -> tuple[dict[str, Any], Any]:  # noqa: N803
        """The columns of X by name and y, checked; what scikit-learn refuses is a TableError in its words."""
        if reset:  # a fit that fails leaves no model of other columns or classes
            self.__dict__.pop("model_", None)
        try:
            return self._checked(X, y, reset)
        except ValueError as error:
            raise error if isinstance(error, TableError) else TableError(str(error)) from None

    def _checked(self, X: Any, y: Any, reset: bool) -> tuple[dict[str, Any], Any]:  # noqa: N803
        if reset and y is None:
            raise TableError("fit requires y to be passed, but the target y is None: pass the values to learn")
        columns = frames.columns_of(X)
        if columns:
            # Names and their number alone: an array of all cells would lose their types.
            validate_data(self, X, reset=reset, skip_check_array=True)
            check_consistent_length(X, y)
            return self._named([*columns.values()]), None if y is None else column_or_1d(y, warn=True)
        settings: dict[str, Any] = {"dtype": None, "ensure_all_finite": "allow-nan", "reset": reset}
        if y is None:
            cells = validate_data(self, X, **settings)
        else:
            cells, y = validate_data(self, X, y, y_numeric=self._task == "record_regression", **settings)
        return self._named([*cells.T]), y

    def _named(self, cells: list[Any]) -> dict[str, Any]:
        """Columns by their names in `fit`: to scikit-learn, arrays and DataFrames are alike."""
        names = list(getattr(self, "feature_names_in_", ()))
        if len(set(names)) < len(cells):
            names = [f"x{index}" for index in range(len(cells))]
        return dict(zip(names, cells, strict=True))

    def _fit(self, columns: dict[str, Any], y: Any, name: Any) -> None:
        if len(y) < 2:
            raise TableError("one sample is too few to learn from (n_samples=1): give at least two rows")
        self.target_ = name if name and isinstance(name, str) and name not in columns else "target"
        while self.target_ in columns:
            self.target_ += "_"
        with frames.as_table_error(), tempfile.TemporaryDirectory(prefix="openm6-") as folder:
            table = frames.arrow_table(columns | {self.target_: y}, "X")
            self.fields_ = _fields(table.arrow, self.target_, numeric=self._task == "record_regression")
            seed = int(check_random_state(self.random_state).randint(MAX_SEED))
            split = "split"  # a column of this name may be one of X
            while split in table.names:
                split += "_"
            row = "row"  # validation rows are drawn by their numbers, not by what a column `id` may hold
            while row in table.names:
                row += "_"
            written = with_files(table.arrow, self.fields_).append_column(split, pa.array(["train"] * len(y)))
            written = written.append_column(row, pa.array(range(len(y))))
            pq.write_table(written, f"{folder}/table.parquet")
            self.model_ = self._train(Path(folder), split, row, len(y), seed)

    def _train(self, folder: Path, split: str, row: str, rows: int, seed: int) -> OpenM6:
        fields, path = self.fields_.model_dump(exclude_none=True), str(folder / "table.parquet")
        source: dict[str, Any] = {"kind": "parquet", "path": path, "fields": fields}
        source |= {"target": self.target_, "split": split, "test_by": row}
        loop: dict[str, Any] = {"seed": seed, "num_processes": 1, "tensorboard": False, "keep_last": 1}
        if self.max_steps is not None:
            loop["steps"] = self.max_steps
        else:
            loop |= {"steps": "auto", "minutes": self.time_limit / 60}
            if rows >= MIN_VALIDATED:
                # In a minute a small table would be learned by heart.
                source["validation_fraction"] = VALIDATION
                loop |= {"held_out": {"every": 50}, "early_stopping_patience": 5, "load_best_model_at_end": True}
        values: dict[str, Any] = {
            "model": dict(self.model or {}) | ({} if self.base is None else {"start": str(self.base)}),
            "sources": {SOURCE: source},
            "mixture": [{"source": SOURCE, "task": self._task}],
            "loop": loop,
            "eval": {"at_end": False},
        }
        result = train_values(values, type(self).__name__, RunFolder(folder / "run"), self.device)
        self.n_iter_ = result.steps
        return load(result.checkpoint, self.device)

    def _records(self, X: Any) -> list[Any]:  # noqa: N803
        check_is_fitted(self, "model_")
        columns, _ = self._table(X)
        with frames.as_table_error():
            records = frames.frame_records(frames.arrow_table(columns, "X"), self.fields_, self.target_)
            frames.spell_as_trained(self.model_.loaded, records)
            return records


class OpenM6Regressor(RegressorMixin, _TableEstimator):
    """Predict a number, with quantiles, from columns of numbers, categories, texts, images and audio.

    base: run, checkpoint, name or Hub id, as of `load`, whose weights training starts from; None: from scratch
    time_limit: seconds of training; with `max_steps`, so many steps instead, and equal results for equal seeds
    model: the section `model` of a recipe, such as {"preset": "nano"}
    device: auto, cpu, cuda or cuda:N

    Columns of X that hold paths or bytes of image or audio files are read as such; missing values may stay.

    >>> X, y = [[0.0], [1.0], [2.0], [3.0]] * 4, [0.0, 1.0, 2.0, 3.0] * 4
    >>> regressor = OpenM6Regressor(max_steps=2, model=tiny, random_state=0).fit(X, y)
    >>> regressor.predict([[1.5]], output_type="quantiles", quantile_levels=[0.1, 0.9]).shape
    (1, 2)
    """

    _task = "record_regression"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = self._is_short
        return tags

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Train on N rows; raise ValueError (TableError) if the columns cannot be learned from.  # N F, N"""
        columns, values = self._table(X, y, reset=True)
        try:
            values = np.asarray(values, float)
        except (TypeError, ValueError):
            raise TableError("y holds values that are no numbers: convert them, or use OpenM6Classifier") from None
        if not np.isfinite(values).all():
            raise TableError("Input y contains NaN or infinite values: drop these rows")
        self._fit(columns, values, getattr(y, "name", None))
        return self

    def predict(
        self, X: Any, output_type: str = "mean", quantile_levels: Sequence[float] = frames.LEVELS  # noqa: N803
    ) -> np.ndarray:  # fmt: skip
        """Return the mean, the median or quantiles of each row, as `output_type` asks.  # N F -> N, or N Q"""
        if output_type not in ("mean", "median", "quantiles"):
            raise TableError(f"output_type={output_type!r} is not one of mean, median, quantiles")
        frames.check_levels(quantile_levels)
        records = self._records(X)
        loaded = self.model_.loaded
        answers = frames.number_answers(loaded, loaded.task(self._task), records, self.target_, SOURCE)
        # The task takes whatever a row holds, so that each has an answer.
        found = [one for one in answers if one is not None]
        if output_type == "quantiles":
            return np.array([[one.quantile(level)[0] for level in quantile_levels] for one in found])
        return np.array([(one.mean() if output_type == "mean" else one.median())[0] for one in found])


class OpenM6Classifier(ClassifierMixin, _TableEstimator):
    """Predict a class from columns of numbers, categories, texts, images and audio; parameters of `OpenM6Regressor`.

    >>> X, y = [["red"], ["blue"]] * 8, ["warm", "cold"] * 8
    >>> OpenM6Classifier(max_steps=2, model=tiny, random_state=0).fit(X, y).predict_proba([["red"]]).shape
    (1, 2)
    """

    _task = "record_classification"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = self._is_short
        return tags

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Train on N rows; raise ValueError (TableError) if the columns cannot be learned from.  # N F, N"""
        columns, values = self._table(X, y, reset=True)
        try:
            check_classification_targets(values)
            self.classes_, index = np.unique(values, return_inverse=True)
        except ValueError as error:
            raise TableError(str(error)) from None
        except TypeError:
            raise TableError("y holds missing values, or values of several types: drop or convert them") from None
        names = [" ".join(str(one).split()) for one in self.classes_]
        # Names carry meaning; those that a table would read as missing, or that are alike in what is read of them, are
        # counted: a token is a byte or more of a name.
        own = len({name.encode()[:SHORT] for name in names}) == len(names) and not any(map(is_no_class, names))
        self.class_names_ = names if own else [f"class {number}" for number in range(len(names))]
        self._fit(columns, [self.class_names_[one] for one in index], getattr(y, "name", None))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return probabilities of the classes, in the order of `classes_`.  # N F -> N K"""
        records, loaded = self._records(X), self.model_.loaded
        task, names = loaded.task(self._task), self.class_names_
        probability = frames.class_probabilities(loaded, task, records, self.target_, names, source=SOURCE)
        return np.nan_to_num(probability, nan=1 / len(names))  # of a row without any value

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return the likeliest class of each row.  # N F -> N"""
        likeliest = self.predict_proba(X).argmax(1)
        return self.classes_[likeliest]


def _fields(table: pa.Table, target: str, numeric: bool) -> Fields:
    """What fills a record: numbers by their type, all else by what the cells look like."""
    found: dict[str, Any] = {"numbers": [], "categories": [], "dates": {}}
    for name in table.column_names[:-1]:
        kind, language, stored = "number", None, table.schema.field(name).type
        if not pa.types.is_primitive(stored) or pa.types.is_temporal(stored):
            column = column_of(name, table.column(name).to_pylist())
            kind, language = column.kind, column.language
        if kind == "number":
            found["numbers"].append(name)
        elif kind == "date" and len(column.formats) < 2:
            found["dates"][name] = next(iter(column.formats), None)
        elif kind in LIMITS:
            if kind in found:
                raise TableError(f"columns {found[kind]!r} and {name!r} both hold files of {kind}: keep one")
            found[kind] = name
        elif kind in ("list", "mapping"):
            raise TableError(f"column {name!r} holds values of type {kind}, which no record has: convert it")
        elif kind == "free text" and not {"text_en", "text_zh"} & set(found):
            found[f"text_{language or 'en'}"] = name
        elif kind not in LEFT_OUT:
            found["categories"].append(name)
    found["numbers" if numeric else "categories"].append(target)
    return Fields(**{key: value for key, value in found.items() if value})


def with_files(table: pa.Table, fields: Fields) -> pa.Table:
    """The table with the content of image and audio files instead of their paths."""
    for kind, limit in LIMITS.items():
        name = getattr(fields, kind)
        if name is not None and not pa.types.is_binary(table.column(name).type):
            content = [as_bytes(cell, name, limit, frames.read_file) for cell in table.column(name).to_pylist()]
            table = table.set_column(table.column_names.index(name), name, pa.array(content, pa.binary()))
    return table


def finetune(
    start: str | Path,
    data: str | Path | pd.DataFrame | Mapping[str, Any],
    target: str | None = None,
    *,
    time_limit: float = 180.0,
    steps: int | None = None,
    out: str | Path | None = None,
    replay: float = 0.0,
    freeze: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
) -> OpenM6:
    """Train a model further on your data, and return it.

    start: the folder of a run or checkpoint, a name as of `load`, or a Hub id
    data: a table or folder, as of `openm6 data inspect`; a DataFrame; a recipe as a path or mapping
    target: the column to predict; without one, all that the data allow is learned
    time_limit: seconds of training, unless a recipe sets `loop.minutes` or `loop.steps`
    steps: so many steps instead, also of a recipe
    out: a new folder for the run; without one nothing is left on the disk
    replay: fraction of the examples that are from the mixture of the start, so that it forgets less
    freeze: what keeps its weights, such as "backbone" or "text"

    Raises OpenM6Error if the start, a setting or the data cannot be used; nothing is left behind then.

    >>> model = finetune(run, penguins, target="flipper_length_mm", steps=1)
    >>> model.predict(penguins, target="flipper_length_mm").columns[0]
    'predictions'
    """
    with tempfile.TemporaryDirectory(prefix="openm6-") as temporary, ExitStack() as stack:
        run = RunFolder(Path(temporary) / "run" if out is None else Path(out).expanduser())
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise ConfigError(f"{run.path} is not empty: choose another folder")
        stack.enter_context(RunFolder.open(run.path).lock())
        try:
            values = _recipe(data, target, str(start), time_limit / 60, run)
            named, loop, evaluated = sections = [values.get(name) or {} for name in ("model", "loop", "eval")]
            if not all(isinstance(section, Mapping) for section in sections):
                raise ConfigError("model, loop and eval of a recipe are mappings, as in openm6 data inspect")
            if Path(str(named.get("start") or start)) != Path(start):
                raise ConfigError(f"the recipe starts from {named['start']}, and not from {start}: name one of them")
            limit = {"steps": "auto", "minutes": time_limit / 60} if steps is None else {"steps": steps}
            values["loop"] = {"seed": seed, **limit, **loop} | (limit if steps is not None else {})
            values["model"] = {**named, "start": str(start)} | ({"freeze": list(freeze)} if freeze else {})
            values |= {"replay": replay} if replay else {}
            values["eval"] = {**evaluated, "at_end": False}
            return load(train_values(values, "finetune", run, device).checkpoint, device)
        except OpenM6Error:
            if not list_checkpoints(run.checkpoints):
                shutil.rmtree(run.path, ignore_errors=True)
            raise


def _recipe(data: Any, target: str | None, start: str, minutes: float, run: RunFolder) -> dict[str, Any]:
    """The plain values of a recipe, proposed for the data if they are none; a DataFrame is kept in the run."""
    path, columns = str(data), frames.columns_of(data)
    if getattr(data, "iloc", None) is not None:
        if not columns or not len(data):
            raise DataError("a DataFrame with at least one row, and columns with names of their own, is needed")
        table = frames.arrow_table(columns, "the DataFrame").arrow
        path = str(RunFolder.open(run.path).path / "data.parquet")
        kinds = {name: column_of(name, table.column(name).to_pylist()).kind for name in columns}
        for name, kind in kinds.items():
            table = with_files(table, Fields(**{kind: name})) if kind in LIMITS else table
        pq.write_table(table, path)
    elif isinstance(data, Mapping) or path.endswith((".yaml", ".yml")):
        if target is not None:
            raise ConfigError("a recipe names its targets itself: leave target out")
        return dict(data) if isinstance(data, Mapping) else read_yaml(recipe_path(path))
    target = None if target is None else str(target)  # names of columns may be numbers in pandas
    return dict(yaml.safe_load(inspect_path(path, minutes, target, start).usable_recipe()))
