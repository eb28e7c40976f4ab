"""Fine-tuning in Python: `finetune`, from a model and data to a model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import yaml

from openm6.api.estimators import LIMITS, with_files
from openm6.api.frames import arrow_table, columns_of
from openm6.api.model import OpenM6, load
from openm6.checkpoint.folder import list_checkpoints
from openm6.core.config import read_yaml
from openm6.core.errors import ConfigError, DataError, OpenM6Error
from openm6.core.run_folder import RunFolder
from openm6.data.inspect import inspect_path
from openm6.data.propose import column_of
from openm6.data.records import Fields
from openm6.train.run import recipe_path, train_values

if TYPE_CHECKING:
    import pandas as pd


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
    with tempfile.TemporaryDirectory(prefix="openm6-") as temporary:
        run = RunFolder(Path(temporary) / "run" if out is None else Path(out).expanduser())
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise ConfigError(f"{run.path} is not empty: choose another folder")
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
    path, columns = str(data), columns_of(data)
    if getattr(data, "iloc", None) is not None:
        if not columns or not len(data):
            raise DataError("a DataFrame with at least one row, and columns with names of their own, is needed")
        table, path = arrow_table(columns, "the DataFrame").arrow, str(RunFolder.open(run.path).path / "data.parquet")
        kinds = (column_of(name, table.column(name).to_pylist()) for name in columns)
        pq.write_table(with_files(table, Fields(**{x.kind: x.name for x in kinds if x.kind in LIMITS})), path)
    elif isinstance(data, Mapping) or path.endswith((".yaml", ".yml")):
        if target is not None:
            raise ConfigError("a recipe names its targets itself: leave target out")
        return dict(data) if isinstance(data, Mapping) else read_yaml(recipe_path(path))
    return dict(yaml.safe_load(inspect_path(path, minutes, target, start).usable_recipe()))
