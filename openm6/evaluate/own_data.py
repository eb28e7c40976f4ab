"""The records of `openm6 evaluate --data`: a table or folder read as the model's own sources were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from openm6.base.errors import DataError
from openm6.base.log import get_log
from openm6.data.media import FolderConfig, data_config
from openm6.data.source import Source, SourceConfig
from openm6.data.table import TableConfig
from openm6.data.windows import WindowsConfig

Readable = TableConfig | FolderConfig | WindowsConfig


def open_own_data(path: str, trained: Mapping[str, SourceConfig]) -> dict[str, Source]:
    """The data at a path as it can stand in for each source that the model was trained on.

    The test rows where a column (or folder) says which they are, else all. The settings of the trained source, such as
    `fields`, are used where the columns fit, else canonical column names. A source that it cannot stand in for is
    left out.

    Raises:
        DataError: nothing at the path can be read, or it can stand in for no source.
    """
    plain = data_config(path)
    opened: dict[str, Source] = {}
    failures: list[DataError] = []
    for name, config in trained.items():
        try:
            opened[name] = _first_that_fits(name, list(_candidates(plain, config)))
        except DataError as error:
            failures.append(error)
    if not opened:
        raise DataError(f"--data {path} can stand in for no source of this model: {failures[0]}")
    for failure in failures:
        get_log().info(f"--data {path}: {failure}")
    return opened


def _first_that_fits(name: str, candidates: list[Readable]) -> Source:
    """The first config that opens; the error of the first, which is closest to the training, where none does."""
    failures = []
    for config in candidates:
        try:
            return config.open_held_out(name)
        except DataError as error:
            failures.append(error)
    raise failures[0]


def _candidates(plain: TableConfig | FolderConfig, trained: SourceConfig) -> Iterator[Readable]:
    """Ways to read the data, those closest to the training first."""
    here = {"path": plain.path}
    if isinstance(trained, WindowsConfig):
        if isinstance(plain, TableConfig):
            yield trained.model_copy(update=here)
        return
    if isinstance(trained, FolderConfig) and isinstance(plain, FolderConfig):
        yield trained.model_copy(update=here)
        return
    if isinstance(trained, TableConfig) and isinstance(plain, TableConfig):
        if trained.kind == plain.kind:
            yield trained.model_copy(update=here)
        yield plain.model_copy(update={"fields": trained.fields, "split": trained.split})
    yield plain
