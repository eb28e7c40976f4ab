"""What a record is: its keys, how a cell becomes the value of a key, and which column of a table fills which."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID

import numpy as np

from openm6.core.config import Config
from openm6.core.errors import DataError, MissingColumnError, nearest
from openm6.modalities.dates import date_columns, date_names
from openm6.modalities.regression import MAX_NUMBER
from openm6.tasks.slots import FILLED_BY, INPUT_ONLY

Record = dict[str, Any]
"""One row of data. Keys that the row does not fill are absent.

`id`, `source`, `license`: str · `image`, `audio`: bytes of a PNG, JPEG, FLAC, Ogg, … file, not yet decoded ·
`text_en`, `text_zh`, `label`, `label_zh`, `question`, `answer`: str · `tags_en`, `tags_zh`: list[str] ·
`numbers`: dict[str, float | None] (None = missing) · `categories`: dict[str, str | None] ·
`series`: dict[str, list[float | None]] · `extra`: dict of anything else · `messages`: list of {role, content}, the
content a list of {type, text | image | audio | numbers}.
"""

OpenFile = Callable[[str, int], bytes]  # a name in a table and the most bytes allowed -> the bytes of the file
T = TypeVar("T")

TEXT_KEYS = ("id", "source", "license", "text_en", "text_zh", "label", "label_zh", "question", "answer")
LIST_KEYS = ("tags_en", "tags_zh")
COLUMN_KEYS = (*TEXT_KEYS, *LIST_KEYS, "image", "audio")
CANONICAL_KEYS = (*COLUMN_KEYS, "numbers", "categories", "series", "extra")
PAIRED_COLUMNS = ("num_names", "num_values")

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3", ".opus")
MAX_TEXT_BYTES = 1 << 20
MAX_IMAGE_BYTES = 32 << 20
MAX_AUDIO_BYTES = 64 << 20
MISSING_WORDS = frozenset({"", "na", "n/a", "nan", "null", "none", "-"})
# Cells without a class. "none" may be one beside "mild" and "severe", and "Na" a symbol.
NO_CLASSES = frozenset({"", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "-"})


def contents_of(record: Record) -> list[dict[str, Any]]:
    """What is said in all messages of a record."""
    return [item for message in record.get("messages") or () for item in message["content"]]


def unless_broken(read: Callable[..., T], *arguments: Any) -> T | None:
    """What is read, or None if it is broken."""
    try:
        return read(*arguments)
    except DataError:
        return None


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN or an empty string."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def is_blank(value: Any) -> bool:
    """Whether a cell holds nothing, or a word for it (`NA`, `null`, …)."""
    return is_missing(value) or (isinstance(value, str) and value.strip().lower() in MISSING_WORDS)


def is_no_class(value: Any) -> bool:
    """Whether a cell of labels holds nothing, or a word for it as programs write it."""
    return is_missing(value) or (isinstance(value, str) and value.strip() in NO_CLASSES)


def as_text(value: Any, column: str) -> str | None:
    """A cell as text, None if it is missing; DataError if it is not UTF-8, longer than 1 MiB or not a scalar."""
    if is_missing(value):
        return None
    value = decode_utf8(value, column)
    if isinstance(value, (datetime, date, time)):
        value = value.isoformat()
    if isinstance(value, (bool, int, float, Decimal, UUID)):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds a {type(value).__name__} where text is expected")
    if len(value) > MAX_TEXT_BYTES or len(value.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
        raise DataError(f"column {column!r} holds a text of more than {MAX_TEXT_BYTES:,} bytes: shorten it")
    return value or None


def as_class(value: Any, column: str) -> str | None:
    """A cell as the name of a class, as `as_text`, but None for words such as `NA` too.

    Whole numbers beside a missing one are floats in pandas: 1.0 is the class 1.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = as_text(value, column)
    return None if is_no_class(text) else text


def decode_utf8(value: Any, column: str) -> Any:
    """A cell with its bytes, if it holds bytes, as text; DataError if they are not UTF-8."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise DataError(f"column {column!r} is not UTF-8 at byte {error.start}: save the file as UTF-8") from None


def as_number(value: Any, column: str) -> float | None:
    """A cell as a float, None if it is blank; DataError if it is no number, infinite, or beyond MAX_NUMBER."""
    value = decode_utf8(value, column)
    if is_blank(value):
        return None
    # float() would read "1_000" as 1000, which no table means.
    if not isinstance(value, (str, bool, int, float, Decimal)) or (isinstance(value, str) and "_" in value):
        raise DataError(f"column {column!r} holds {value!r}, which is not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise DataError(f"column {column!r} holds {str(value)[:40]!r}, which is not a number") from None
    if math.isnan(number):
        return None
    if math.isinf(number):
        raise DataError(f"column {column!r} holds an infinite value: leave the cell empty instead")
    if abs(number) > MAX_NUMBER:
        raise DataError(f"column {column!r} holds {number:g}, beyond {MAX_NUMBER:g}: leave the cell empty instead")
    return number


def as_list(value: Any, column: str) -> list[str] | None:
    """A cell as a list of texts: a list, a JSON list, or texts separated by comma, semicolon or `|`."""
    value = decode_utf8(value, column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = as_json(value, column)
    elif isinstance(value, str):
        value = re.split(r"[,;|，；、]", value)
    if value is None:
        return None
    if not isinstance(value, list):
        raise DataError(f"column {column!r} holds a {type(value).__name__} where a list of texts is expected")
    texts = [as_text(item, column) for item in value]
    return [text.strip() for text in texts if text is not None and text.strip()] or None


def as_json(value: Any, column: str) -> Any:
    """The content of a cell that may be JSON text."""
    if not isinstance(value, (str, bytes)):
        return value
    text = as_text(value, column)
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"column {column!r} holds text that is not JSON") from None


def as_mapping(value: Any, column: str, error: str = "must hold a mapping (or JSON text of one)") -> Any:
    """A cell that holds a mapping or JSON text of one; None if it is missing."""
    value = as_json(value, column)
    if value is not None and not isinstance(value, Mapping):
        raise DataError(f"column {column!r} {error}")
    return value


def as_numbers(value: Any, column: str) -> dict[str, float | None] | None:
    """A cell that maps names to numbers (a dict, or JSON text of one)."""
    found = as_mapping(value, column, "must map names to numbers, such as {'price': 3.5}")
    if found is None:
        return None
    return {str(name): as_number(number, f"{column}.{name}") for name, number in found.items()}


def as_categories(value: Any, column: str) -> dict[str, str | None] | None:
    """A cell that maps names to texts (a dict, or JSON text of one)."""
    found = as_mapping(value, column, "must map names to texts, such as {'colour': 'red'}")
    return None if found is None else {str(k): as_class(text, f"{column}.{k}") for k, text in found.items()}


def as_series(value: Any, column: str) -> dict[str, list[float | None]] | None:
    """A cell that maps names to lists of numbers (a dict, or JSON text of one)."""
    error = "must map names to lists of numbers, such as {'price': [3.5, 4]}"
    found = as_mapping(value, column, error)
    if found is None:
        return None
    if not all(isinstance(numbers, list) for numbers in found.values()):
        raise DataError(f"column {column!r} {error}")
    return {str(k): [as_number(one, f"{column}.{k}") for one in numbers] for k, numbers in found.items()}


def as_bytes(value: Any, column: str, limit: int, open_file: OpenFile) -> bytes | None:
    """A cell as the bytes of an image or audio file: bytes, `{bytes, path}` or a name; DataError if broken or large."""
    if isinstance(value, Mapping):  # the {bytes, path} struct of `datasets`
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if is_blank(value):
        return None
    if isinstance(value, str):
        value = open_file(value, limit)
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise DataError(f"column {column!r} holds a {type(value).__name__} where a file's bytes or name is expected")
    if len(value) > limit:
        raise DataError(
            f"column {column!r} holds a file of {len(value):,} bytes; the most allowed is {limit:,}: shrink or cut it"
        )
    if len(value) == 0:
        raise DataError(f"column {column!r} holds an empty file")
    return bytes(value)


def plain(value: Any) -> Any:
    """A cell for `extra`: NumPy scalars and arrays as plain Python values, NaN as None, everything else as it is."""
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    return None if isinstance(value, float) and math.isnan(value) else value


class Fields(Config):
    """Record key ← column, such as `image: photo`, `numbers: [price, rating]`; see `docs/own-data.md`."""

    id: str | None = None
    image: str | None = None
    audio: str | None = None
    text_en: str | None = None
    text_zh: str | None = None
    tags_en: str | None = None
    tags_zh: str | None = None
    label: str | None = None
    label_zh: str | None = None
    question: str | None = None
    answer: str | None = None
    numbers: list[str] | None = None
    categories: list[str] | None = None
    dates: dict[str, str | None] | None = None  # column: its format, or none if it can be read in one way
    extra: list[str] | None = None


class RowReader:
    """Turns one row (column → cell) into a record.

    Without `fields`, columns with canonical names are read (and `num_names` + `num_values` as numbers); with
    `fields`, the columns named there, and `id` if the table has it. Of `task_fields`, those that the table has are
    read besides, unless `fields` fills the key otherwise.
    """

    def __init__(
        self,
        columns: Sequence[str],
        fields: Fields | None,
        open_file: OpenFile,
        where: str,
        task_fields: Fields | None = None,
    ) -> None:
        if fields is None:
            named = {key: key for key in CANONICAL_KEYS if key in columns}
        else:
            named = {key: column for key in COLUMN_KEYS if (column := getattr(fields, key, None)) is not None}
            named = ({"id": "id"} if "id" in columns else {}) | named
        if task_fields is not None:
            own = {key: getattr(task_fields, key) for key in ("image", "audio")}
            named = {key: column for key, column in own.items() if column in columns} | named
        convert: dict[str, Callable[[Any, str], Any]] = {
            **dict.fromkeys(TEXT_KEYS, as_text),
            **dict.fromkeys(("label", "label_zh"), as_class),
            **dict.fromkeys(LIST_KEYS, as_list),
            "image": lambda value, column: as_bytes(value, column, MAX_IMAGE_BYTES, open_file),
            "audio": lambda value, column: as_bytes(value, column, MAX_AUDIO_BYTES, open_file),
            "numbers": as_numbers,
            "categories": as_categories,
            "series": as_series,
            "extra": lambda value, column: as_mapping(value, column) or None,
        }
        self.single = {key: (column, convert[key]) for key, column in named.items()}  # keys that one column fills
        self._numbers, self._categories, self._extra = (
            listed_columns(key, fields, task_fields, columns) for key in ("numbers", "categories", "extra")
        )
        self._filled_by = {key: column for key, column in named.items() if column in self._categories}
        self._dates = dict(fields.dates or {}) if fields is not None else {}
        self._date_parts = [name for column in self._dates for name in date_names(column)]
        self._paired = fields is None and all(name in columns for name in PAIRED_COLUMNS)
        # Of each column that is read, the keys that it fills; a column of `extra` fills a key of its own name.
        self.columns: dict[str, list[str]] = {}
        numbers = [*self._numbers, *self._dates, *(PAIRED_COLUMNS if self._paired else ())]
        fills = [*named.items(), *(("numbers", name) for name in numbers)]
        fills += [*(("categories", name) for name in self._categories), *((name, name) for name in self._extra)]
        for key, column in fills:
            self.columns.setdefault(column, []).append(key)
        check_columns(self.columns, columns, where)
        filled = [*self._numbers, *self._categories, *(set(named) - {"id", "source", "license"})]
        filled += self._extra if task_fields is not None else []
        if not filled and not self._paired:
            listing = ", ".join(repr(str(column)) for column in list(columns)[:12])
            raise DataError(
                f"{where}: no column fills a record: add `fields:`, such as text_en: … (columns: {listing})"
            )

    def read(self, row: Mapping[str, Any]) -> Record:
        """The record of one row, without keys whose cells are missing; DataError if a cell does not fit its key."""
        record: Record = {}
        for key, (column, convert) in self.single.items():
            if (value := convert(row.get(column), column)) is not None:
                record[key] = value
        if self._numbers:
            numbers = {name: as_number(row.get(name), name) for name in self._numbers}
            record["numbers"] = record.get("numbers", {}) | numbers
        if self._categories:
            named = {name: as_class(row.get(name), name) for name in self._categories}
            record["categories"] = record.get("categories", {}) | named
        if self._paired and (names := row.get("num_names")):
            values = row.get("num_values")
            if not isinstance(names, list) or not isinstance(values, list) or len(names) != len(values):
                raise DataError("columns 'num_names' and 'num_values' must be lists of one length")
            record["numbers"] = {k: as_number(v, f"num_values[{k}]") for k, v in zip(names, values, strict=True)}
        if self._extra:
            record["extra"] = record.get("extra", {}) | {name: plain(row.get(name)) for name in self._extra}
        for name, form in self._dates.items():
            cell = decode_utf8(row.get(name), name)
            record["numbers"] = record.get("numbers", {}) | date_columns(None if is_blank(cell) else cell, name, form)
            record["extra"] = record.get("extra", {}) | {INPUT_ONLY: self._date_parts}
        if self._filled_by:
            record["extra"] = record.get("extra", {}) | {FILLED_BY: self._filled_by}
        return record


def listed_columns(key: str, fields: Fields | None, task_fields: Fields | None, columns: Sequence[str]) -> list[str]:
    """The columns that fill a key of several columns, each once."""
    own = list(getattr(fields, key, None) or ())
    more = getattr(task_fields, key, None) or ()
    return [*own, *dict.fromkeys(name for name in more if name in columns and name not in own)]


def check_columns(names: Iterable[str], columns: Sequence[str], where: str) -> None:
    """Raise MissingColumnError, with the nearest column, if one of the names is not a column."""
    for column in names:
        if column not in columns:
            raise MissingColumnError(f"{where} has no column {column!r}; {nearest(column, list(columns))}")
