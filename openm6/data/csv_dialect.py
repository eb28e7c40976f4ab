"""What a CSV file does not say of itself: its separator, whether its first line is a header, its decimal mark."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from openm6.base.errors import DataError
from openm6.data.storage import open_binary

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
            "columns above it, or, in a source of kind csv, give them as `columns: [...]`"
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
