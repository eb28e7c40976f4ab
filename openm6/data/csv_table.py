"""CSV and TSV tables; a row with too many or too few cells is a broken row, not a broken file."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from pydantic import Field, field_validator

from openm6.base.errors import DataError
from openm6.data.csv_dialect import check_header, decimal_mark, is_numeric, sniff_separator, with_point
from openm6.data.foreign import refuse_foreign
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
        self.decimals: dict[str, str] = {}  # the decimal mark of columns whose numbers are not written as 3.5

    def __len__(self) -> int:
        return super().__len__() + len(self.unreadable)

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """The cells of one row as text; DataError where the row is broken."""
        if row >= self.arrow.num_rows:
            raise UnreadableRowError(self.unreadable[row - self.arrow.num_rows])
        cells = super().row(row, columns)
        return {name: self._text(name, decode_utf8(self._bytes(cell), name)) for name, cell in cells.items()}

    def column(self, column: str) -> list[Any]:
        """A whole column as text, None for broken rows."""
        cells = [self._bytes(cell).decode(UTF8, "replace") for cell in super().column(column)]
        return [self._text(column, cell) for cell in cells] + [None] * len(self.unreadable)

    def _text(self, column: str, cell: str) -> str:
        return with_point(cell, self.decimals[column]) if column in self.decimals else cell

    def _bytes(self, cell: bytes) -> bytes:
        """A cell as it stands in the file."""
        return cell if self.encoding == UTF8 else cell.decode(UTF8).encode(self.encoding)


class CsvConfig(TableConfig):
    """CSV, UTF-8, with a header line unless `columns` names the columns."""

    kind: Literal["csv"] = "csv"
    separator: str | None = Field(default=None, min_length=1, max_length=1)  # found in the first rows
    columns: list[str] | None = Field(default=None, min_length=1)  # of a file without a header line
    decimal: Literal[",", "."] | None = None  # the decimal mark, where a column of numbers leaves it open

    @field_validator("columns")
    @classmethod
    def _each_once(cls, columns: list[str] | None) -> list[str] | None:
        if columns is not None and len(set(columns)) != len(columns):
            raise ValueError("columns must name each column once")
        return columns

    def load(self, path: str, choose: ChooseColumns) -> CsvTable:
        """The chosen columns as bytes; see TableConfig.load."""
        path = self._only_file(path)
        refuse_foreign(path)
        encoding = _encoding(path)
        separator = self.separator or sniff_separator(path)
        stored = self.columns or _header(path, encoding, separator)
        names = self.columns or _names(stored, encoding, path)
        broken: list[str] = []

        def set_aside(row: pa_csv.InvalidRow) -> str:
            expected = f"`columns` names {len(names)}" if self.columns else f"the header has {len(names)}"
            broken.append(f"line {row.number} has {row.actual_columns} cells where {expected}")
            return "skip"

        convert = pa_csv.ConvertOptions(
            column_types=dict.fromkeys(stored, pa.binary()),
            include_columns=[stored[names.index(name)] for name in choose(names)],
            strings_can_be_null=False,
        )
        try:
            with open_binary(path) as file:
                reading, parsing = _reading(encoding, self.columns), _parsing(separator, set_aside)
                arrow = pa_csv.read_csv(file, reading, parsing, convert)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as CSV: {_first_line(error)}") from None
        arrow = arrow.rename_columns([names[stored.index(name)] for name in arrow.column_names])
        if broken and not arrow.num_rows:
            raise DataError(f"no row of {path} fits: {broken[0]}; check the header and `separator`")
        table = CsvTable(arrow, path, broken, encoding)
        table.decimals = self._decimals(table)
        return table

    def _decimals(self, table: CsvTable) -> dict[str, str]:
        """The decimal marks of the columns that are read as numbers; without `fields`, of those that may be."""
        found: dict[str, str] = {}
        for name in table.names if self.fields is None else self.fields.numbers or ():
            if self.decimal != "," and not pc.any(pc.match_substring(table.arrow.column(name), b",")).as_py():
                continue
            cells = table.column(name)
            if self.fields is not None or is_numeric(cells):
                found[name] = self.decimal or decimal_mark(cells, name, table.where)
        return found

    def _only_file(self, path: str) -> str:
        files = find_files(path, (".csv", ".tsv"))
        if len(files) > 1:
            raise DataError(f"{path} stands for {len(files)} files: name one CSV file for each source")
        return files[0]


def _header(path: str, encoding: str, separator: str) -> list[str]:
    """The names of the columns as they were read in that encoding."""
    try:
        with open_binary(path) as file:
            reader = pa_csv.open_csv(file, _reading(encoding), _parsing(separator, lambda row: "skip"))
            return list(reader.schema.names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as CSV: {_first_line(error)}") from None


def _reading(encoding: str, columns: list[str] | None = None) -> pa_csv.ReadOptions:
    # One thread: only then are the line numbers of broken rows known.
    return pa_csv.ReadOptions(
        use_threads=False, block_size=BLOCK_BYTES, encoding=encoding, column_names=columns
    )


def _parsing(separator: str, set_aside: Any) -> pa_csv.ParseOptions:
    return pa_csv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=set_aside)


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
    check_header(names, path)
    return names


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
