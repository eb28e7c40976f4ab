"""CSV, TSV and JSON Lines; a row that cannot be parsed is a broken row, not a broken file."""

from __future__ import annotations

import codecs
import csv
import io
import json
import mmap
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from pydantic import Field, field_validator

from openm6.core.errors import DataError
from openm6.data.records import decode_utf8
from openm6.data.storage import find_files, first_line, is_remote, open_binary, refuse_foreign
from openm6.data.table import ArrowTable, ChooseColumns, Table, TableConfig, UnreadableRowError

SEPARATORS = (",", ";", "\t", "|")  # the first of those that fit equally well is taken
SAMPLE_BYTES = 1 << 16
SAMPLE_ROWS = 50

_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+")
_POINT = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)\.\d+")
_THOUSANDS = {
    "comma": re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+"),
    "point": re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+"),
}


def sniff_separator(path: str) -> str:
    """The separator that cuts the header into several cells and most of the next rows into as many.

    A comma where none does: the table has one column.
    """
    with open_binary(path) as file:
        sample = file.read(SAMPLE_BYTES)
    text = sample.decode("latin-1").removeprefix("\xef\xbb\xbf")
    if len(sample) == SAMPLE_BYTES:
        text = text[: text.rfind("\n") + 1] or text
    return max(SEPARATORS, key=lambda separator: _fit(text, separator))


def _fit(text: str, separator: str) -> tuple[float, int]:
    """How well a separator fits: the share of rows as wide as the header, then the width; zero for one column."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row]
    except csv.Error:  # a cell beyond the reader's limit
        return 0.0, 0
    header, *others = rows[: SAMPLE_ROWS + 1] or [[]]
    if len(header) < 2:
        return 0.0, 0
    alike = sum(len(row) == len(header) for row in others)
    return (1 + alike) / (1 + len(others)), len(header)


def check_header(names: Sequence[str], path: str) -> None:
    """Raise DataError if the first line is no header: all of its cells are numbers."""
    if all(_is_number(name) for name in names):
        shown = ", ".join(names[:3])
        raise DataError(
            f"the first line of {path} holds only numbers ({shown}), so it is no header: write the names of the "
            "columns above it, or, in a source of kind csv, name them as `columns: [...]`"
        )


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


def decimal_mark(cells: Iterable[str | None], column: str, where: str) -> str:
    """`,` where the numbers of a column are written 3,5, and `.` otherwise.

    Raises:
        DataError: some numbers have a comma and some a point, or 1,234 may be a thousand or little more than one.
    """
    forms = Counter(_form(cell.strip()) for cell in cells if cell)
    if not forms["comma"] and not forms["thousands"]:
        return "."
    if forms["point"] or not forms["comma"]:
        raise DataError(
            f"{where}: numbers of column {column!r} can be read in two ways (is 1,234 a thousand?): "
            'add decimal: "," or decimal: "." to the source'
        )
    return ","


def is_numeric(cells: Iterable[str | None]) -> bool:
    """Whether every cell that is filled has the form of a number, with a comma or a point."""
    return all(_is_number(cell.replace(",", "")) for cell in cells if cell and cell.strip())


def _form(text: str) -> str:
    if _THOUSANDS["comma"].fullmatch(text):
        return "thousands"
    if _COMMA.fullmatch(text):
        return "comma"
    return "point" if _POINT.fullmatch(text) else "other"


def with_point(text: str, decimal: str) -> str:
    """A number as Python writes it, from one with that decimal mark; other texts as they are."""
    number = text.strip()
    if decimal == "," and (_COMMA.fullmatch(number) or _THOUSANDS["point"].fullmatch(number)):
        return number.replace(".", "").replace(",", ".")
    if decimal == "." and (_POINT.fullmatch(number) or _THOUSANDS["comma"].fullmatch(number)):
        return number.replace(",", "")
    return text


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
            raise DataError(f"{path} cannot be read as CSV: {first_line(error)}") from None
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
        raise DataError(f"{path} cannot be read as CSV: {first_line(error)}") from None


def _reading(encoding: str, columns: list[str] | None = None) -> pa_csv.ReadOptions:
    # One thread: only then are the line numbers of broken rows known.
    return pa_csv.ReadOptions(
        use_threads=False, block_size=BLOCK_BYTES, encoding=encoding, column_names=columns
    )


def _parsing(separator: str, set_aside: Any) -> pa_csv.ParseOptions:
    return pa_csv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=set_aside)


def _encoding(path: str) -> str:
    """UTF-8, or Latin-1 where some byte is not: it takes any byte for a letter, and writes it back unchanged.

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
            f"the first line of {path} is not UTF-8: if it is a CSV, save it again as UTF-8"
        ) from None
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(f"{path} has two columns called {doubled[0]!r}: rename one in the header")
    check_header(names, path)
    return names


HEADER_LINES = 200  # the columns are those of the first lines
SCAN_BYTES = 16 << 20


class JsonlTable(Table):
    """Lines of a file (memory-mapped where it is local), each a JSON object; blank lines do not count."""

    def __init__(self, path: str) -> None:
        self.where = path
        self._content = _content(path)
        self._ends = _line_ends(self._content)
        starts = np.concatenate([[0], self._ends + 1])[: len(self._ends)].astype(np.int64)
        filled = [
            bool(self._content[a:b].strip())
            for a, b in zip(starts.tolist(), self._ends.tolist(), strict=True)
        ]
        self._lines = np.flatnonzero(filled)
        self._starts = starts
        if len(self) == 0:
            raise DataError(f"{path} is empty: write one JSON object a line")
        self.names = self._column_names()

    def __len__(self) -> int:
        return len(self._lines)

    def place(self, row: int) -> str:
        """Where a row is, for a person: its line, counted from 1."""
        return f"line {int(self._lines[row]) + 1}"

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """The object of one line.

        Raises:
            DataError: not UTF-8, not JSON, or not an object.
        """
        line = self._lines[row]
        text = self._content[int(self._starts[line]) : int(self._ends[line])].removeprefix(b"\xef\xbb\xbf")
        try:
            found = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON ({str(error)[:80]})") from None
        if not isinstance(found, dict):
            raise DataError("not a JSON object: each line must be {…}")
        return found

    def column(self, column: str) -> list[Any]:
        """One key of every line, None where the line is broken or lacks it."""
        return [self._quiet(row).get(column) for row in range(len(self))]

    def _quiet(self, row: int) -> Mapping[str, Any]:
        try:
            return self.row(row, ())
        except DataError:
            return {}

    def _column_names(self) -> list[str]:
        names = [name for row in range(min(len(self), HEADER_LINES)) for name in self._quiet(row)]
        if not names:
            raise DataError(
                f"{self.where}: none of the first lines is a JSON object: write one object per line, not one array"
            )
        return list(dict.fromkeys(names))


class JsonlConfig(TableConfig):
    """JSON Lines, UTF-8: one object a line."""

    kind: Literal["jsonl"] = "jsonl"

    def load(self, path: str, choose: ChooseColumns) -> JsonlTable:
        """The lines of the file; the columns are not picked apart before a line is read."""
        files = find_files(path, (".jsonl", ".ndjson"))
        if len(files) > 1:
            raise DataError(f"{path} stands for {len(files)} files: name one JSONL file for each source")
        refuse_foreign(files[0])
        table = JsonlTable(files[0])
        choose(table.names)
        return table


def _content(path: str) -> bytes | mmap.mmap:
    with open_binary(path) as file:
        if is_remote(path):
            return file.read()
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            return b""


def _line_ends(content: bytes | mmap.mmap) -> np.ndarray:
    """Offsets of the line breaks, and of the end where the last line has none."""
    ends = []
    for start in range(0, len(content), SCAN_BYTES):
        block = np.frombuffer(content[start : start + SCAN_BYTES], dtype=np.uint8)
        ends.append(np.flatnonzero(block == 10).astype(np.int64) + start)
    if len(content) and content[-1:] != b"\n":
        ends.append(np.array([len(content)], dtype=np.int64))
    return np.concatenate(ends) if ends else np.zeros(0, dtype=np.int64)
