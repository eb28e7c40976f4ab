"""Tables by file name: the reader that fits the ending of a path."""

from __future__ import annotations

from pathlib import Path

from openm6.base.errors import DataError
from openm6.data.csv_table import CsvConfig
from openm6.data.folder import FolderConfig
from openm6.data.jsonl import JsonlConfig
from openm6.data.parquet import EMBEDDED_MARK, ParquetConfig
from openm6.data.storage import is_remote
from openm6.data.table import ChooseColumns, Table, TableConfig
from openm6.data.tar import TarConfig

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".tar")


def table_config(path: str) -> TableConfig:
    """The config that reads the table at a path, by its ending (Parquet where the ending says nothing)."""
    name = path.lower()
    if not path.startswith(EMBEDDED_MARK):
        if name.endswith((".csv", ".tsv")):
            return CsvConfig(path=path)
        if name.endswith((".jsonl", ".ndjson")):
            return JsonlConfig(path=path)
        if name.endswith(".tar"):
            return TarConfig(path=path)
    return ParquetConfig(path=path)


def data_config(path: str) -> TableConfig | FolderConfig:
    """The config that reads what is at a path: a table, a folder of Parquet files or tars, or one of media files.

    Raises:
        DataError: nothing is there.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        if (
            not place.exists()
            and not is_remote(path)
            and not path.startswith(EMBEDDED_MARK)
            and "*" not in path
        ):
            raise DataError(f"there is nothing at {path}: check the path")
        return table_config(path)
    names = [file.name for file in place.iterdir()]
    if any(name.endswith(".tar") for name in names):
        return TarConfig(path=path)
    return (
        ParquetConfig(path=path)
        if any(name.endswith(".parquet") for name in names)
        else FolderConfig(path=path)
    )


def load_table(path: str, choose: ChooseColumns = list) -> Table:
    """The table at a path with the columns that `choose` picks; raises DataError where it cannot be read."""
    return table_config(path).load(path, choose)
