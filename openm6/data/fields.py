"""Which column of a user's table fills which key of a record, and the reader that applies it to one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openm6.base.config import Config, nearest
from openm6.base.errors import DataError
from openm6.data.records import (
    AUDIO_KEYS,
    CANONICAL_KEYS,
    COLUMN_KEYS,
    IMAGE_KEYS,
    LIST_KEYS,
    MAX_AUDIO_BYTES,
    MAX_IMAGE_BYTES,
    TEXT_KEYS,
    OpenFile,
    Record,
    as_bytes,
    as_json,
    as_list,
    as_number,
    as_numbers,
    as_series,
    as_text,
    plain,
)

Convert = Callable[[Any, str], Any]
PAIRED_COLUMNS = ("num_names", "num_values")


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
    extra: list[str] | None = None

    def columns(self) -> list[str]:
        """Every column named, in the order of the keys."""
        return [*self.single().values(), *(self.numbers or ()), *(self.extra or ())]

    def single(self) -> dict[str, str]:
        """The keys that one column fills, each with its column."""
        return {key: column for key in COLUMN_KEYS if (column := getattr(self, key, None)) is not None}


class RowReader:
    """Turns one row (column → cell) into a record.

    Without `fields`, columns with canonical names are read (and `num_names` + `num_values` as numbers); with
    `fields`, the columns named there, and `id` where the table has it.
    """

    def __init__(
        self, columns: Sequence[str], fields: Fields | None, open_file: OpenFile, where: str
    ) -> None:
        if fields is not None:
            check_columns(fields.columns(), columns, where)
        self._single = self._single_columns(columns, fields, open_file)
        self._numbers = list(fields.numbers or ()) if fields else []
        self._extra = list(fields.extra or ()) if fields else []
        self._paired = fields is None and all(name in columns for name in PAIRED_COLUMNS)
        paired = PAIRED_COLUMNS if self._paired else ()
        read = [*(column for column, _ in self._single.values()), *self._numbers, *self._extra, *paired]
        self.columns = list(dict.fromkeys(read))
        if not set(self._single) - {"id", "source", "license"} and not self._numbers and not self._paired:
            listing = ", ".join(repr(str(column)) for column in list(columns)[:12])
            raise DataError(
                f"{where}: no column fills a record: add `fields:`, such as text_en: … (columns: {listing})"
            )

    @staticmethod
    def _single_columns(
        columns: Sequence[str], fields: Fields | None, open_file: OpenFile
    ) -> dict[str, tuple[str, Convert]]:
        if fields is None:
            named = {key: key for key in CANONICAL_KEYS if key in columns}
        else:
            named = {"id": "id"} if "id" in columns else {}
            named |= fields.single()
        return {key: (column, _converter(key, open_file)) for key, column in named.items()}

    def keys_of(self, column: str) -> list[str]:
        """The keys that a column fills; a column of `extra` is known by its own name."""
        keys = [key for key, (own, _) in self._single.items() if own == column]
        if column in self._numbers or (self._paired and column in PAIRED_COLUMNS):
            keys.append("numbers")
        return [*keys, column] if column in self._extra else keys

    def column_of(self, key: str) -> str | None:
        """The column that fills `key`, if one column does."""
        return self._single[key][0] if key in self._single else None

    def convert(self, key: str, cell: Any) -> Any:
        """One cell as the value of `key`; None where it is missing."""
        column, convert = self._single[key]
        return convert(cell, column)

    def read(self, row: Mapping[str, Any]) -> Record:
        """The record of one row; keys whose cells are missing are absent.

        Raises:
            DataError: a cell is broken, too large, or of another kind than its key.
        """
        record: Record = {}
        for key, (column, convert) in self._single.items():
            value = convert(row.get(column), column)
            if value is not None:
                record[key] = value
        if self._numbers:
            record["numbers"] = {name: as_number(row.get(name), name) for name in self._numbers}
        if self._paired and row.get("num_names"):
            record["numbers"] = _paired_numbers(row["num_names"], row.get("num_values"))
        if self._extra:
            record["extra"] = {name: plain(row.get(name)) for name in self._extra}
        return record


def check_columns(wanted: Sequence[str], columns: Sequence[str], where: str) -> None:
    """Raises DataError, naming the nearest column, where a wanted column is not there."""
    for column in wanted:
        if column not in columns:
            raise DataError(f"{where} has no column {column!r}; {nearest(column, list(columns))}")


def _converter(key: str, open_file: OpenFile) -> Convert:
    if key in TEXT_KEYS:
        return as_text
    if key in LIST_KEYS:
        return as_list
    if key in IMAGE_KEYS:
        return lambda value, column: as_bytes(value, column, MAX_IMAGE_BYTES, open_file)
    if key in AUDIO_KEYS:
        return lambda value, column: as_bytes(value, column, MAX_AUDIO_BYTES, open_file)
    others: dict[str, Convert] = {
        "numbers": as_numbers,
        "series": as_series,
        "extra": _as_extra,
    }
    return others[key]


def _as_extra(value: Any, column: str) -> dict[str, Any] | None:
    value = as_json(value, column)
    if value is None or isinstance(value, dict):
        return value or None
    raise DataError(f"column {column!r} must hold a mapping (or JSON text of one)")


def _paired_numbers(names: list[str], values: list[float | None] | None) -> dict[str, float | None]:
    if values is None or len(names) != len(values):
        raise DataError("columns 'num_names' and 'num_values' must be lists of one length")
    return {name: as_number(value, f"num_values[{name}]") for name, value in zip(names, values, strict=True)}
