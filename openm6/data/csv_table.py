"""CSV and TSV tables; a row with too many or too few cells is a broken row, not a broken file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pa_csv
from pydantic import Field

from openm6.base.errors import DataError
from openm6.data.records import decode_utf8
from openm6.data.storage import find_files, open_binary
from openm6.data.table import ArrowTable, ChooseColumns, TableConfig, UnreadableRowError

BLOCK_BYTES = 16 << 20  # the longest row that can be read


class CsvTable(ArrowTable):
    """Cells as bytes, decoded when asked for, so that a cell that is not UTF-8 breaks its own row only."""

    def __init__(self, arrow: pa.Table, where: str, broken: list[str]) -> None:
        super().__init__(arrow, where)
        self.unreadable = broken  # rows with a wrong number of cells come after the good ones

    def __len__(self) -> int:
        return super().__len__() + len(self.unreadable)

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """The cells of one row as text; DataError where the row is broken."""
        if row >= self.arrow.num_rows:
            raise UnreadableRowError(self.unreadable[row - self.arrow.num_rows])
        return {name: decode_utf8(cell, name) for name, cell in super().row(row, columns).items()}

    def column(self, column: str) -> list[Any]:
        """A whole column as text, None for broken rows."""
        cells = [cell.decode("utf-8", "replace") for cell in super().column(column)]
        return cells + [None] * len(self.unreadable)


class CsvConfig(TableConfig):
    """CSV with a header line, UTF-8; `separator` may be a tab or a semicolon."""

    kind: Literal["csv"] = "csv"
    separator: str = Field(default=",", min_length=1, max_length=1)

    def load(self, path: str, choose: ChooseColumns) -> CsvTable:
        """The chosen columns as bytes; see TableConfig.load."""
        path = self._only_file(path)
        names = self._header(path)
        broken: list[str] = []

        def set_aside(row: pa_csv.InvalidRow) -> str:
            broken.append(
                f"line {row.number} has {row.actual_columns} cells where the header has {len(names)}"
            )
            return "skip"

        convert = pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.binary()),
            include_columns=list(choose(names)),
            strings_can_be_null=False,
        )
        try:
            with open_binary(path) as file:
                arrow = pa_csv.read_csv(file, self._reading(), self._parsing(set_aside), convert)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as CSV: {_first_line(error)}") from None
        return CsvTable(arrow, path, broken)

    def _only_file(self, path: str) -> str:
        files = find_files(path, (".csv", ".tsv"))
        if len(files) > 1:
            raise DataError(f"{path} stands for {len(files)} files: name one CSV file for each source")
        return files[0]

    def _header(self, path: str) -> list[str]:
        try:
            with open_binary(path) as file:
                reader = pa_csv.open_csv(file, self._reading(), self._parsing(lambda row: "skip"))
                names = list(reader.schema.names)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as CSV: {_first_line(error)}") from None
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise DataError(f"{path} has two columns called {doubled[0]!r}: rename one in the header")
        return names

    def _reading(self) -> pa_csv.ReadOptions:
        # One thread: only then are the line numbers of broken rows known.
        return pa_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)

    def _parsing(self, set_aside: Any) -> pa_csv.ParseOptions:
        return pa_csv.ParseOptions(
            delimiter=self.separator, newlines_in_values=True, invalid_row_handler=set_aside
        )


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
