"""CSV, TSV and JSON Lines; a row that cannot be parsed is a broken row, not a broken file."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import mmap
import re
import shutil
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from itertools import islice
from typing import IO, Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from pydantic import Field, field_validator

from openm6.core.errors import DataError, first_line
from openm6.core.log import get_log
from openm6.data.number_formats import NumberFormat, UndecidedMarkError, Written, decimal_mark, written_numbers
from openm6.data.records import RowReader, decode_utf8, listed_columns, unless_broken
from openm6.data.storage import is_remote, only_file, open_binary
from openm6.data.table import ArrowTable, Table, TableConfig, UnreadableRowError
from openm6.modalities.dates import is_date

SEPARATORS = (",", ";", "\t", "|")  # the first of those that fit equally well is used
SAMPLE_BYTES = 1 << 20  # from which the separator is detected
SAMPLE_ROWS = 50
BLOCK_BYTES = 16 << 20  # the longest row that can be read, the header included
UTF8, LATIN, WINDOWS, UTF16 = "utf-8", "latin-1", "cp1252", "utf-16"
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x19\x1b-\x1f\x7f]")  # bytes of no text in one byte per letter
_UNUSUAL = rb"[^0-9.eE+-]|\..*\."  # in a cell: not a number as Python writes it
_SHORT, _LONG = (
    rb"^[+-]?\d{1,3}$",
    rb"^[+-]?\d{4,}$",
)  # whole numbers that need no mark of thousands, and that have none
_THOUSAND = rb"^[+-]?[1-9]\d{0,2}\.\d{3}$"  # among numbers as Python writes them: where the mark is a comma, a thousand
HEADER_LINES = 200  # at equal distances, whose keys are the columns of JSON Lines
JSONL_ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")


def sample_rows(path: str, separator: str, encoding: str = UTF8) -> Iterator[list[str]]:
    """The first rows of a CSV, the header among them; UTF-8 with each byte as one letter (Latin-1)."""
    with open_binary(path) as file:
        sample = file.read(SAMPLE_BYTES)
        if b"\n" not in sample and b"\r" not in sample:  # a header of very many columns
            sample += file.read(BLOCK_BYTES - SAMPLE_BYTES)
    text = sample.decode(LATIN if encoding == UTF8 else encoding, "ignore").removeprefix("\xef\xbb\xbf")
    if len(sample) >= SAMPLE_BYTES:
        text = text[: text.rfind("\n") + 1] or text
    try:
        yield from islice(csv.reader(io.StringIO(text, newline=""), delimiter=separator), SAMPLE_ROWS + 1)
    except csv.Error:  # a cell beyond the reader's limit: the rows before it are enough
        return


def sniff_separator(path: str, encoding: str = UTF8) -> str:
    """The separator that cuts the header into several cells and most rows into as many; a comma for one column."""

    def fit(separator: str) -> tuple[float, int]:
        """The fraction of rows as wide as the header, then the width; zero for one column."""
        header, *others = [row for row in sample_rows(path, separator, encoding) if row] or [[]]
        alike = sum(len(row) == len(header) for row in others)
        return ((1 + alike) / (1 + len(others)), len(header)) if len(header) > 1 else (0.0, 0)

    return max(SEPARATORS, key=fit)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


class CsvTable(ArrowTable):
    """Cells as bytes, decoded when asked for, so that a cell that is not UTF-8 breaks its own row only."""

    def __init__(self, path: str, config: CsvConfig) -> None:
        self.where = only_file(path, config.endings, "CSV")
        self._config = config
        self._encoding = _encoding(self.where)
        self._separator = config.separator or sniff_separator(self.where, self._encoding)
        self._skipped, self.names = (0, config.columns) if config.columns else self._header()
        self._set_aside: list[tuple[int, int]] = []  # rows with a wrong number of cells: which, and the number
        self._formats: dict[str, NumberFormat] = {}  # of columns whose numbers are not written as 3.5
        self.as_written: set[str] = set()  # columns of texts
        self.like: CsvTable | None = None  # the table that was trained on, whose decimal marks hold here too

    def __len__(self) -> int:
        return super().__len__() + len(self.unreadable)

    def read(self, columns: Sequence[str]) -> None:
        Table.read(self, columns)
        # One thread: only then are the numbers of broken rows known.
        reading = pa_csv.ReadOptions(
            use_threads=False,
            block_size=BLOCK_BYTES,
            encoding=self._encoding,
            column_names=self.names,
            skip_rows_after_names=self._skipped,
        )
        parsing = pa_csv.ParseOptions(
            delimiter=self._separator, newlines_in_values=True, invalid_row_handler=self._handle_invalid
        )
        types = dict.fromkeys(self.names, pa.binary())
        convert = pa_csv.ConvertOptions(column_types=types, include_columns=list(columns), strings_can_be_null=False)
        try:
            with open_binary(self.where) as file:
                self.arrow = pa_csv.read_csv(file, reading, parsing, convert)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.where} cannot be read as CSV: {first_line(error)}") from None
        source = "`columns` names" if self._config.columns else "the header has"
        self.unreadable = [  # they come after the good ones
            f"{self._record_name(record)} has {count} cells where {source} {len(self.names)}"
            for record, count in self._set_aside
        ]
        if self.unreadable and not self.arrow.num_rows:
            raise DataError(f"no row of {self.where} fits: {self.unreadable[0]}; check the header and `separator`")
        self._find_formats(columns)

    def _find_formats(self, columns: Sequence[str]) -> None:
        """Set the formats of the columns of numbers; without `fields`, any that is no text may hold them."""
        fields, like, self._formats = self._config.fields, self.like, {}
        numbers = listed_columns("numbers", fields, self._config.task_fields, columns)
        if fields is None:
            others = (name for name in columns if name not in self.as_written and name not in numbers)
            # The points of 01.2015 are no decimal marks.
            numbers += [name for name in others if not self._holds_dates(name)]
        if like is not None:
            like.read([name for name in columns if name in like.names])
        written: dict[str, Written] = {}
        given: dict[str, str] = {}
        for name in numbers:
            decimal: str | None = self._config.decimal
            if decimal is None and like is not None and name in like.names:
                decimal = like.shown_mark(name)
            if decimal is not None:
                given[name] = decimal
            if decimal == "," or self._count(name, _UNUSUAL):
                found = written_numbers(self.column(name), certain=fields is not None)
            else:
                thousands = self._count(name, _THOUSAND)
                marks = Counter({".": self._count(name, rb"\.") - thousands, "1.234": thousands})
                # Semicolons are for tables of decimal commas: there, 1.234 beside 466 may be a thousand.
                if self._separator == ";" and self._count(name, _SHORT) and not self._count(name, _LONG):
                    marks["1,234"] = thousands
                found = Written("", marks, stay=True)
            if found is not None:
                written[name] = found
        self._set_formats(written, given)

    def _holds_dates(self, name: str) -> bool:
        cells = [self._bytes(cell).decode(UTF8, "replace") for cell in self.arrow[name][:HEADER_LINES].to_pylist()]
        filled = [cell for cell in cells if cell.strip()]
        return bool(filled) and all(map(is_date, filled))

    def _set_formats(self, written: Mapping[str, Written], given: Mapping[str, str]) -> None:
        """Set the formats of columns by how they are written and by marks that are given."""
        others = [one.marks for name, one in written.items() if name not in given]
        shown = [marks for marks in others if marks["."] or marks[","]]
        certain = {*given.values(), *map(decimal_mark, shown)} - {None}
        elsewhere = certain.pop() if len(certain) == 1 else None
        for name, one in written.items():
            mark = given.get(name, decimal_mark(one.marks, elsewhere))
            if mark is None:
                number = "1.234" if one.marks["1.234"] else "1,234"
                error = UndecidedMarkError(
                    f"{self.where}: numbers of column {name!r} can be read in two ways (is {number} a thousand?): "
                    'add decimal: "," or decimal: "." to the source'
                )
                commas, points = (sum(marks[mark] for marks in shown) for mark in ",.")
                error.likely = "," if commas > points or (number == "1.234" and commas == points) else "."
                raise error
            if not one.stay or (mark == "," and one.marks[","] + one.marks["1.234"]):
                self._formats[name] = NumberFormat(mark, one.unit)
        self.units = {name: form.unit for name, form in self._formats.items() if form.unit}

    def _count(self, column: str, pattern: bytes) -> int:
        """The number of cells with a pattern in them."""
        return pc.sum(pc.match_substring_regex(self.arrow.column(column), pattern)).as_py() or 0

    def shown_mark(self, column: str) -> str | None:
        """The decimal mark of a column of numbers, if a cell has a mark."""
        form = self._formats.get(column)
        if form is None:
            return "." if self._count(column, rb"\.") else None
        return form.mark if self._count(column, b"[.,]") else None

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        if row >= self.arrow.num_rows:
            raise UnreadableRowError(self.unreadable[row - self.arrow.num_rows])
        cells = super().row(row, columns)
        return {name: self._text(name, decode_utf8(self._bytes(cell), name)) for name, cell in cells.items()}

    def column(self, column: str) -> list[Any]:
        cells = [self._bytes(cell).decode(UTF8, "replace") for cell in super().column(column)]
        return [self._text(column, cell) for cell in cells] + [None] * len(self.unreadable)

    def _header(self) -> tuple[int, list[str]]:
        """The number of rows up to the header, and the names of the columns."""
        rows = sample_rows(self.where, self._separator, self._encoding)
        count, header = next(((n, row) for n, row in enumerate(rows, 1) if row), (0, []))
        if not header:
            raise DataError(f"{self.where} cannot be read as CSV: its first line holds no names of columns")
        try:
            names = header
            if self._encoding in (UTF8, LATIN):
                names = [name.encode(LATIN).decode(UTF8) for name in header]
        except UnicodeDecodeError:
            raise DataError(
                f"the first line of {self.where} is not UTF-8: if it is a CSV, save it again as UTF-8"
            ) from None
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise DataError(f"{self.where} has two columns called {doubled[0]!r}: rename one in the header")
        if all(_is_number(name) for name in names):
            raise DataError(
                f"the first line of {self.where} holds only numbers ({', '.join(names[:3])}), so it is no header: "
                "write the names of the columns above it, or, in a source of kind csv, name them as `columns: [...]`"
            )
        return count, names

    def _handle_invalid(self, row: pa_csv.InvalidRow) -> str:
        self._set_aside.append((row.number - self._skipped - 1, row.actual_columns))
        return "skip"

    def row_name(self, row: int) -> str:
        if row >= self.arrow.num_rows:
            return self._record_name(self._set_aside[row - self.arrow.num_rows][0])
        before = bisect_right(range(len(self._set_aside)), row, key=lambda index: self._set_aside[index][0] - index)
        return self._record_name(row + before)

    def _record_name(self, record: int) -> str:
        alike = len(self._lines) == self.arrow.num_rows + len(self._set_aside)
        return f"line {self._lines[record]}" if alike else f"row {record}"

    @cached_property
    def _lines(self) -> array[int]:
        """The line on which each record begins. Arrow counts records, some with line breaks, and no blank lines."""
        found = array("q")
        encoding = LATIN if self._encoding == UTF8 else self._encoding
        with io.TextIOWrapper(open_binary(self.where), encoding, newline="") as file:
            reader = csv.reader(file, delimiter=self._separator)
            first = 1
            try:
                for number, row in enumerate(reader):
                    if row and number >= self._skipped:
                        found.append(first)
                    first = reader.line_num + 1
            except csv.Error:  # a cell beyond the reader's limit
                return array("q")
        return found

    def _text(self, column: str, cell: str) -> str:
        """A cell as it is, but a number as Python writes it, if the column writes numbers in another way."""
        form = self._formats.get(column)
        return cell if form is None else form.plain(cell)

    def _bytes(self, cell: bytes) -> bytes:
        """The UTF-8 of a cell, or what stands for it in the file; Arrow keeps its letters in UTF-8."""
        return cell.decode(UTF8).encode(LATIN) if self._encoding == LATIN else cell


def _encoding(path: str) -> str:
    """UTF-8; UTF-16 if the file begins with its mark; else Windows-1252 or, for broken rows in UTF-8, Latin-1.

    Latin-1 reads any byte as a letter and writes it back: Arrow cannot hand over broken rows in a wrong encoding.
    """
    try:
        with open_binary(path) as file:
            marked = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        if _decodes(path, UTF16 if marked else UTF8):
            return UTF16 if marked else UTF8
        with open_binary(path) as file:
            windows = all(map(_may_be_windows, file))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if windows:
        _warn_of_windows(path)
    return WINDOWS if windows else LATIN


def _decodes(path: str, encoding: str) -> bool:
    try:
        with io.TextIOWrapper(open_binary(path), encoding) as text:
            while text.read(BLOCK_BYTES):
                pass
    except UnicodeError:
        return False
    return True


def _may_be_windows(line: bytes) -> bool:
    """Whether a line may be in Windows-1252: text in it, and not in UTF-8 beyond ASCII."""
    if _CONTROL.search(line) is not None:
        return False
    if line.isascii():
        return True
    for encoding, fits in ((UTF8, False), (WINDOWS, True)):
        try:
            line.decode(encoding)
            return fits
        except UnicodeDecodeError:
            continue
    return False


@cache
def _warn_of_windows(path: str) -> None:
    get_log().warning(f"{path} is not UTF-8 and is read as Windows-1252: if letters look wrong, save it as UTF-8")


class CsvConfig(TableConfig):
    """CSV with a header line unless `columns` names the columns."""

    endings: ClassVar[tuple[str, ...]] = (".csv", ".tsv")
    kind: Literal["csv"] = "csv"
    separator: str | None = Field(default=None, min_length=1, max_length=1)  # found in the first rows
    columns: list[str] | None = Field(default=None, min_length=1)  # of a file without a header line
    decimal: Literal[",", "."] | None = None  # the decimal mark, if a column of numbers leaves it open

    @field_validator("columns")
    @classmethod
    def _each_once(cls, columns: list[str] | None) -> list[str] | None:
        if columns is not None and len(set(columns)) != len(columns):
            raise ValueError("columns must name each column once")
        return columns

    def load(self, path: str) -> CsvTable:
        table = CsvTable(path, self)
        if path == self.test_path and self.decimal is None:
            with suppress(DataError):  # of a trained model, the table may be gone
                table.like = CsvTable(self.path, self)
        return table

    def reader(self, table: Table, path: str) -> RowReader:
        reader = super().reader(table, path)
        if self.fields is None and isinstance(table, CsvTable):
            table.as_written = {column for column, _ in reader.single.values()}
            if table.like is not None:
                table.like.as_written = table.as_written
        return reader


def _open_unpacked(path: str) -> IO[bytes]:
    """An open file of lines; one that ends in .gz is unpacked into a temporary file, which may be memory-mapped."""
    if not path.lower().endswith(".gz"):
        return open_binary(path)
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the caller
    try:
        with open_binary(path) as packed, gzip.GzipFile(fileobj=packed) as file:
            shutil.copyfileobj(file, unpacked)
    except (OSError, EOFError, zlib.error) as error:
        unpacked.close()
        raise DataError(f"{path} cannot be unpacked ({error}): copy it again") from None
    unpacked.seek(0)
    return unpacked


class JsonlTable(Table):
    """Lines of a file (memory-mapped if it is local), each a JSON object; blank lines do not count."""

    def __init__(self, path: str) -> None:
        self.where = path
        # Of each line that is not blank: its number and where it begins and ends.
        self._lines, self._starts, self._ends = array("q"), array("q"), array("q")
        with _open_unpacked(path) as file:
            remote = file.read() if is_remote(path) and not path.lower().endswith(".gz") else b""
            start = 0
            for number, line in enumerate(io.BytesIO(remote) if remote else file, 1):
                if line.strip():
                    self._lines.append(number)
                    self._starts.append(start)
                    self._ends.append(start + len(line.rstrip(b"\n")))
                start += len(line)
            if len(self) == 0:
                raise DataError(f"{path} is empty: write one JSON object per line")
            self._content = remote or mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        sample = range(0, len(self), -(-len(self) // HEADER_LINES))
        self.names = list(dict.fromkeys(name for row in sample for name in unless_broken(self.row, row, ()) or {}))
        if not self.names:
            raise DataError(f"{path}: no line of a sample is a JSON object: write one object per line, not one array")

    def __len__(self) -> int:
        return len(self._lines)

    def row_name(self, row: int) -> str:
        return f"line {self._lines[row]}"

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        text = self._content[self._starts[row] : self._ends[row]].removeprefix(b"\xef\xbb\xbf")
        try:
            found = json.loads(text.decode(UTF8))
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON ({str(error)[:80]})") from None
        if not isinstance(found, dict):
            raise DataError("not a JSON object: each line must be {…}")
        return found


class JsonlConfig(TableConfig):
    """JSON Lines, UTF-8: one object per line; also as .gz."""

    endings: ClassVar[tuple[str, ...]] = JSONL_ENDINGS
    kind: Literal["jsonl"] = "jsonl"

    def load(self, path: str) -> JsonlTable:
        return JsonlTable(only_file(path, self.endings, "JSONL"))
