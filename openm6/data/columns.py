"""What the columns of a user's table hold, guessed from a sample of their cells."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from openm6.base.errors import DataError
from openm6.data.folder import AUDIO_ENDINGS, IMAGE_ENDINGS
from openm6.data.records import MISSING_WORDS, as_number, is_missing
from openm6.data.split import split_named
from openm6.data.times import is_date

Kind = Literal[
    "picture",
    "sound",
    "number",
    "category",
    "free text",
    "identifier",
    "date",
    "split",
    "list",
    "mapping",
    "empty",
]

MOST = 0.9  # of the cells must agree before a column is called a kind; the others are reported as broken
MAX_CATEGORIES = 50
MAX_CATEGORY_LETTERS = 40
IDENTIFIER_NAMES = frozenset({"id", "key", "uuid", "guid", "index", "idx", "row"})
CATEGORY_NAMES = frozenset(
    {"label", "class", "category", "target", "species", "kind", "type", "genre", "digit"}
)
_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM")
_AUDIO_MAGIC = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb")
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class Column:
    """One column: its kind, how full it is, and what its values are like."""

    name: str
    kind: Kind
    language: Literal["en", "zh"] | None  # of categories and free text
    missing: int  # cells of the sample
    distinct: int
    summary: str  # one line for a person
    odd: int  # cells of the sample that do not fit the kind


def column_of(name: str, cells: Sequence[Any]) -> Column:
    """The column that a sample of its cells speaks for."""
    filled = [cell for cell in cells if not _is_absent(cell)]
    kind = _kind(name, filled)
    texts = [str(cell) for cell in filled if isinstance(cell, (str, int, float, bool))]
    odd = sum(not _fits(kind, cell) for cell in filled)
    language = _language(texts) if kind in ("category", "free text") else None
    distinct = len(filled) if kind in ("picture", "sound") else len({str(cell) for cell in filled})
    return Column(name, kind, language, len(cells) - len(filled), distinct, _summary(kind, filled), odd)


def _is_absent(cell: Any) -> bool:
    return is_missing(cell) or (isinstance(cell, str) and cell.strip().lower() in MISSING_WORDS)


def _kind(name: str, cells: Sequence[Any]) -> Kind:
    if not cells:
        return "empty"
    for kind in ("picture", "sound", "list", "mapping", "date"):
        if _share(kind, cells) >= MOST:
            return kind
    texts = [str(cell) for cell in cells]
    if name.lower() == "split" and all(split_named(text) for text in texts):
        return "split"
    unique = len(set(texts)) == len(texts) > 1
    if unique and name.lower() in IDENTIFIER_NAMES:
        return "identifier"
    if _share("number", cells) >= MOST:
        return "category" if _is_coded_category(name, texts) else "number"
    return _kind_of_text(texts, unique)


def _kind_of_text(texts: Sequence[str], unique: bool) -> Kind:
    spaced = sum(" " in text.strip() or bool(_CHINESE.search(text)) for text in texts)
    if (
        unique
        and len(texts) >= 10
        and spaced == 0
        and sum(any(c.isdigit() for c in text) for text in texts) > len(texts) / 2
    ):
        return "identifier"
    few = len(set(texts)) <= max(2, min(MAX_CATEGORIES, 0.4 * len(texts)))
    short = statistics.median(len(text) for text in texts) <= MAX_CATEGORY_LETTERS
    return "category" if few and short and not (unique and len(texts) > 2) else "free text"


def _is_coded_category(name: str, texts: Sequence[str]) -> bool:
    """Whether numbers stand for classes: a telling name and few whole values."""
    whole = all(float(text) == int(float(text)) for text in texts if _is_number(text))
    return whole and name.lower() in CATEGORY_NAMES and len(set(texts)) <= MAX_CATEGORIES


def _share(kind: Kind, cells: Sequence[Any]) -> float:
    return sum(_fits(kind, cell) for cell in cells) / len(cells)


def _fits(kind: Kind, cell: Any) -> bool:
    """Whether a cell may stand in a column of a kind."""
    if kind in ("picture", "sound"):
        return _is_media(cell, IMAGE_ENDINGS, _IMAGE_MAGIC) if kind == "picture" else _is_sound(cell)
    if kind == "number":
        return _is_number(cell)
    if kind == "date":
        return is_date(cell)
    if kind in ("list", "mapping"):
        return isinstance(cell, list if kind == "list" else Mapping)
    return isinstance(cell, (str, int, float, bool, Decimal))


def _is_media(cell: Any, endings: tuple[str, ...], magic: tuple[bytes, ...]) -> bool:
    if isinstance(cell, Mapping) and {"bytes", "path"} <= set(cell):
        cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
    if isinstance(cell, str):
        return cell.lower().endswith(endings)
    return isinstance(cell, bytes) and (
        cell.startswith(magic) or (b"WEBP" in cell[:16] and b"\x89PNG" in magic)
    )


def _is_sound(cell: Any) -> bool:
    return _is_media(cell, AUDIO_ENDINGS, _AUDIO_MAGIC) or (isinstance(cell, bytes) and cell[8:12] == b"WAVE")


def _is_number(cell: Any) -> bool:
    try:
        return not isinstance(cell, bool) and as_number(cell, "") is not None
    except DataError:
        return False


def _language(texts: Sequence[str]) -> Literal["en", "zh"]:
    chinese = sum(len(_CHINESE.findall(text)) for text in texts)
    return "zh" if chinese > sum(len(_LATIN.findall(text)) for text in texts) / 2 else "en"


def _summary(kind: Kind, cells: Sequence[Any]) -> str:
    if kind == "number":
        numbers = [float(cell) for cell in cells if _is_number(cell)]
        return f"{min(numbers):g} to {max(numbers):g}, mean {statistics.fmean(numbers):.4g}"
    if kind in ("category", "split"):
        common = Counter(str(cell) for cell in cells).most_common(4)
        return ", ".join(f"{_short(text)} ({count})" for text, count in common)
    if kind == "free text":
        lengths = [len(str(cell)) for cell in cells]
        return f"{min(lengths)} to {max(lengths)} letters, such as {_short(str(cells[0]))!r}"
    if kind in ("date", "identifier"):
        return f"{_short(str(cells[0]))} … {_short(str(cells[-1]))}"
    if kind == "list":
        return f"{min(map(len, cells))} to {max(map(len, cells))} items, such as {_short(str(cells[0]))}"
    names = [cell for cell in cells if isinstance(cell, str)]
    return f"such as {_short(names[0])!r}" if names else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:39] + "…"
