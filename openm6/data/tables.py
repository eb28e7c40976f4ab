"""Tables by file name: the reader that fits the ending of a path."""

from __future__ import annotations

from openm6.data.csv_table import CsvConfig
from openm6.data.jsonl import JsonlConfig
from openm6.data.parquet import EMBEDDED_MARK, ParquetConfig
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


def load_table(path: str, choose: ChooseColumns = list) -> Table:
    """The table at a path with the columns that `choose` picks; raises DataError where it cannot be read."""
    return table_config(path).load(path, choose)
