"""CSV and TSV tables; a row with too many or too few cells is a broken row, not a broken file."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pa_csv
from pydantic import Field

from openm6.base.errors import DataError
from openm6.data.records import decode_utf8
from openm6.data.storage import find_files, open_binary
from openm6.data.table import ArrowTable, ChooseColumns, TableConfig, UnreadableRowError

UTF8, LATIN = "utf-8", "latin-1"
BLOCK_BYTES = 16 << 20  # the longest row that can be read


class CsvTable(ArrowTable):
    """Cells as bytes, decoded when asked for, so that a cell that is not UTF-8 breaks its own row only.

    `encoding` is that in which the file was read; its cells are kept in UTF-8 whatever it was.
    """

    def __init__(self, arrow: pa.Table, where: str, broken: list[str], encoding: str = UTF8) -> None:
        super().__init__(arrow, where)
        self.unreadable = broken  # rows with a wrong number of cells come after the good ones
        self.encoding = encoding

    def __len__(self) -> int:
        return super().__len__() + len(self.unreadable)

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """The cells of one row as text; DataError where the row is broken."""
        if row >= self.arrow.num_rows:
            raise UnreadableRowError(self.unreadable[row - self.arrow.num_rows])
        cells = super().row(row, columns)
        return {name: decode_utf8(self._bytes(cell), name) for name, cell in cells.items()}

    def column(self, column: str) -> list[Any]:
        """A whole column as text, None for broken rows."""
        cells = [self._bytes(cell).decode(UTF8, "replace") for cell in super().column(column)]
        return cells + [None] * len(self.unreadable)

    def _bytes(self, cell: bytes) -> bytes:
        """A cell as it stands in the file."""
        return cell if self.encoding == UTF8 else cell.decode(UTF8).encode(self.encoding)


class CsvConfig(TableConfig):
    """CSV with a header line, UTF-8; `separator` may be a tab or a semicolon."""

    kind: Literal["csv"] = "csv"
    separator: str = Field(default=",", min_length=1, max_length=1)

    def load(self, path: str, choose: ChooseColumns) -> CsvTable:
        """The chosen columns as bytes; see TableConfig.load."""
        path = self._only_file(path)
        encoding = _encoding(path)
        stored = self._header(path, encoding)
        names = _names(stored, encoding, path)
        broken: list[str] = []

        def set_aside(row: pa_csv.InvalidRow) -> str:
            broken.append(
                f"line {row.number} has {row.actual_columns} cells where the header has {len(names)}"
            )
            return "skip"

        convert = pa_csv.ConvertOptions(
            column_types=dict.fromkeys(stored, pa.binary()),
            include_columns=[stored[names.index(name)] for name in choose(names)],
            strings_can_be_null=False,
        )
        try:
            with open_binary(path) as file:
                arrow = pa_csv.read_csv(file, self._reading(encoding), self._parsing(set_aside), convert)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as CSV: {_first_line(error)}") from None
        arrow = arrow.rename_columns([names[stored.index(name)] for name in arrow.column_names])
        return CsvTable(arrow, path, broken, encoding)

    def _only_file(self, path: str) -> str:
        files = find_files(path, (".csv", ".tsv"))
        if len(files) > 1:
            raise DataError(f"{path} stands for {len(files)} files: name one CSV file for each source")
        return files[0]

    def _header(self, path: str, encoding: str) -> list[str]:
        """The names of the columns as they were read in that encoding."""
        try:
            with open_binary(path) as file:
                reader = pa_csv.open_csv(file, self._reading(encoding), self._parsing(lambda row: "skip"))
                return list(reader.schema.names)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as CSV: {_first_line(error)}") from None

    def _reading(self, encoding: str) -> pa_csv.ReadOptions:
        # One thread: only then are the line numbers of broken rows known.
        return pa_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, encoding=encoding)

    def _parsing(self, set_aside: Any) -> pa_csv.ParseOptions:
        return pa_csv.ParseOptions(
            delimiter=self.separator, newlines_in_values=True, invalid_row_handler=set_aside
        )


def _encoding(path: str) -> str:
    """UTF-8, or Latin-1 where some byte is not: it takes any byte for a letter, and gives it back as it was.

    Arrow cannot hand over a row with a wrong number of cells whose bytes are not what was announced.
    """
    decoder = codecs.getincrementaldecoder(UTF8)()
    try:
        with open_binary(path) as file:
            while block := file.read(BLOCK_BYTES):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return LATIN
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return UTF8


def _names(stored: list[str], encoding: str, path: str) -> list[str]:
    """The names of the columns in UTF-8."""
    try:
        names = [name.encode(encoding).decode("utf-8-sig") for name in stored]
    except UnicodeDecodeError:
        raise DataError(
            f"the first line of {path} is not UTF-8: if it is a CSV, save it anew as UTF-8"
        ) from None
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(f"{path} has two columns called {doubled[0]!r}: rename one in the header")
    return names


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
