"""Numbers as people write them in tables: decimal comma, thousands marks, percent and currencies, per column."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from openm6.core.errors import DataError
from openm6.data.records import is_blank

AGREEING = 0.9  # of the cells, from which a column without `fields` holds numbers, or all have one decimal mark
SAMPLE = 1000  # cells that decide it

# By decimal mark: numbers with decimals, and whole numbers in groups of three that the other mark separates.
_OTHER_MARK = {".": ",", ",": "."}
_DECIMAL = {
    mark: re.compile(rf"[+-]?(\d*|\d{{1,3}}(\{other}\d{{3}})+)\{mark}\d+([eE][+-]?\d+)?")
    for mark, other in _OTHER_MARK.items()
}
_GROUPED = {mark: re.compile(rf"[+-]?[1-9]\d{{0,2}}(\{other}\d{{3}})+") for mark, other in _OTHER_MARK.items()}
# Spaces and apostrophes between groups, and currencies that no language writes with a decimal comma.
_GAP = re.compile("(?<=\\d)[ \u00a0\u202f'\u2019](?=\\d{3}(?!\\d))")
_COMMA_GROUPS = frozenset({"$", "US$", "£", "¥", "USD", "GBP", "JPY", "CNY"})
_CURRENCY = r"US\$|[$€£¥₹]|USD|EUR|GBP|CHF|JPY|CNY|CAD|AUD|INR"
_NUMBER = re.compile(
    rf"([+-]?)\s*(?:({_CURRENCY})\s*)?([+-]?(?:\d+(?:[.,]\d+)*|[.,]\d+)(?:[eE][+-]?\d+)?)(?:\s*(%|{_CURRENCY}))?"
)


class UndecidedMarkError(DataError):
    """Numbers that can be read in two ways; `likely` is the decimal mark that most cells of the table show."""

    likely = "."


@dataclass(frozen=True)
class NumberFormat:
    """How the numbers of a column are written: the decimal mark, and the unit beside the number, if any."""

    mark: str = "."
    unit: str = ""

    def plain(self, cell: str) -> str:
        """A number as Python writes it; a cell of another form or unit as it is."""
        unit, number = _parts(cell) or ("?", "")
        if unit not in ("", self.unit):
            return cell
        if _DECIMAL[self.mark].fullmatch(number) or _GROUPED[self.mark].fullmatch(number):
            return number.replace(_OTHER_MARK[self.mark], "").replace(self.mark, ".")
        return number


def _parts(cell: str) -> tuple[str, str] | None:
    """Unit and number of a cell; None if it is not a number with one unit at most."""
    found = _NUMBER.fullmatch(_GAP.sub("", cell.strip()))
    if found is None or (found[2] and found[4]) or (found[1] and found[3][0] in "+-"):
        return None
    return found[2] or found[4] or "", found[1] + found[3]


class Written(NamedTuple):
    """How the numbers of a column are written."""

    unit: str  # beside most of them
    marks: Counter[str]  # numbers by the decimal mark that they show; see `_shown_mark`
    stay: bool  # with a decimal point, all of them are as Python writes them


def written_numbers(cells: Sequence[str | None], certain: bool = True) -> Written | None:
    """How the numbers of a column are written; None if too few cells are numbers.

    A column that is `certain` to hold numbers may hold any number of other cells.
    """
    filled = [cell for cell in cells if cell and not is_blank(cell)]
    sample = [parts for parts in map(_parts, filled[:SAMPLE]) if parts]
    if not sample or (not certain and len(sample) < AGREEING * len(filled[:SAMPLE])):
        return None
    units = Counter(unit for unit, _ in sample if unit)
    # Amounts in several units are no column of numbers.
    if units and not certain and units.most_common(1)[0][1] < AGREEING * units.total():
        return None
    unit = units.most_common(1)[0][0] if units else ""
    numbers = [parts[1] for parts in map(_parts, filled) if parts]
    point = NumberFormat(unit=unit)
    marks = Counter(_shown_mark(number, unit in _COMMA_GROUPS) for number in numbers)
    return Written(unit, marks, all(point.plain(cell) == cell for cell in filled))


def _shown_mark(number: str, comma_groups: bool) -> str:
    """The decimal mark that a number shows, `1,234` or `1.234` if that may be a thousand, or nothing.

    `comma_groups`: 1,234 is a thousand.
    """
    for mark, other in _OTHER_MARK.items():
        if _GROUPED[mark].fullmatch(number):
            return mark if number.count(other) > 1 or (comma_groups and mark == ".") else f"1{other}234"
    return next((mark for mark, form in _DECIMAL.items() if form.fullmatch(number)), "")


def decimal_mark(marks: Counter[str], elsewhere: str | None = None) -> str | None:
    """The decimal mark of a column; None if both may be meant. `elsewhere`: that of other columns of the table."""
    mark = max(_OTHER_MARK, key=lambda mark: marks[mark])
    if shown := marks["."] + marks[","]:
        # The others are broken cells.
        return mark if marks[mark] >= AGREEING * shown else None
    return elsewhere or (None if marks["1,234"] else ".")
