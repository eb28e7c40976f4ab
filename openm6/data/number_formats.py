"""Numbers as people write them in tables: decimal comma, thousands marks, percent and currencies, per column."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from openm6.core.errors import DataError
from openm6.data.records import is_blank

AGREEING = 0.9  # of the cells, from which a column without `fields` holds numbers
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


def number_format(
    cells: Sequence[str | None], column: str, where: str, mark: str | None = None, certain: bool = True
) -> NumberFormat | None:
    """The format of a column; None if the numbers are written as Python writes them, or too few cells are numbers.

    A column that is `certain` to hold numbers may hold any number of other cells. `mark` overrules what is found.
    DataError if some numbers have a comma and some a point, or 1,234 may be a thousand or little more than one.
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
    found = NumberFormat(mark or decimal_mark(numbers, column, where, unit in _COMMA_GROUPS), unit)
    return None if all(found.plain(cell) == cell for cell in filled) else found


def decimal_mark(numbers: Sequence[str], column: str, where: str, comma_groups: bool = False) -> str:
    """`,` if numbers are written 3,5, else `.`; `comma_groups`: 1,234 is a thousand. DataError if both may be meant."""
    grouped = {mark: {number for number in numbers if form.fullmatch(number)} for mark, form in _GROUPED.items()}

    def certain(mark: str) -> bool:
        """Whether some number has decimals behind this mark, or the other mark more than once."""
        decimals = any(_DECIMAL[mark].fullmatch(n) for n in numbers if n not in grouped[_OTHER_MARK[mark]])
        return decimals or any(number.count(_OTHER_MARK[mark]) > 1 for number in grouped[mark])

    comma, point = certain(","), certain(".") or (comma_groups and bool(grouped["."]))
    if comma and not point:
        return ","
    if comma or (grouped["."] and not point):
        raise DataError(
            f"{where}: numbers of column {column!r} can be read in two ways (is 1,234 a thousand?): "
            'add decimal: "," or decimal: "." to the source'
        )
    return "."
