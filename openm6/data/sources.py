"""The list of source kinds, and opening all sources of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, get_args

from pydantic import Field

from openm6.base.config import nearest
from openm6.base.errors import DataError
from openm6.data.csv_table import CsvConfig
from openm6.data.datasets_library import DatasetsConfig
from openm6.data.folder import FolderConfig
from openm6.data.jsonl import JsonlConfig
from openm6.data.pairs import PairsConfig
from openm6.data.parquet import EmbeddedConfig, ParquetConfig
from openm6.data.source import Source, SourceConfig, Split
from openm6.data.tar import TarConfig
from openm6.data.windows import WindowsConfig

AnySourceConfig = Annotated[
    EmbeddedConfig
    | ParquetConfig
    | JsonlConfig
    | CsvConfig
    | FolderConfig
    | TarConfig
    | DatasetsConfig
    | PairsConfig
    | WindowsConfig,
    Field(discriminator="kind"),
]
"""The config of any kind of source; a new kind is one line here."""

SOURCES: dict[str, type[SourceConfig]] = {
    str(config.model_fields["kind"].default): config for config in get_args(get_args(AnySourceConfig)[0])
}


def open_sources(configs: Mapping[str, SourceConfig], split: Split) -> dict[str, Source]:
    """Every source of a recipe, by name, holding the records of one split.

    Test splits may be empty (length 0); training splits may not.

    Raises:
        DataError: data that is missing or unreadable as a whole, a column that is not there, a training split
            without records, or sources that refer to one another in a circle.
    """
    opened: dict[str, Source] = {}
    for name in configs:
        _open(name, configs, split, opened, ())
    return {name: opened[name] for name in configs}


def _open(
    name: str,
    configs: Mapping[str, SourceConfig],
    split: Split,
    opened: dict[str, Source],
    path: tuple[str, ...],
) -> Source:
    if name in path:
        raise DataError(f"sources refer to one another in a circle: {' → '.join((*path, name))}")
    if name not in configs:
        raise DataError(
            f"source {path[-1]!r} refers to {name!r}, which is not a source; {nearest(name, list(configs))}"
        )
    if name not in opened:
        source = configs[name].open(
            name, split, lambda other: _open(other, configs, split, opened, (*path, name))
        )
        if split == "train" and len(source) == 0:
            raise DataError(
                f"source {name!r} has no training records: check its path, split column or test_share"
            )
        opened[name] = source
    return opened[name]
