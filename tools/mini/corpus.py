"""Rows of the corpus: their columns, the split of each, and the Parquet file of a part."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tools.mini.packages import PACKAGES, Packages

Row = dict[str, Any]
"""The columns of a record (docs/own-data.md); `numbers`, `categories` and `extra` are mappings, `tags_*` lists.

A row of a series has its `name`, a `time` and a `monthly` or `daily` value instead.
"""

TEXTS = ("id", "source", "license", "split", "text_en", "text_zh", "label", "label_zh", "question", "answer",
         "name", "time")  # fmt: skip
BYTES = ("image", "audio")
LISTS = ("tags_en", "tags_zh")
MAPPINGS = ("numbers", "categories", "extra")
SERIES = ("monthly", "daily")
TYPES = {
    **dict.fromkeys(TEXTS, pa.string()),
    **dict.fromkeys(BYTES, pa.binary()),
    **dict.fromkeys(LISTS, pa.list_(pa.string())),
    **dict.fromkeys(MAPPINGS, pa.string()),
    **dict.fromkeys(SERIES, pa.float64()),
}
ROWS_OF_A_GROUP = 2000


@dataclass(frozen=True)
class Part:
    """One file of the corpus: what makes its rows, out of which packages, and whether it may train a model."""

    rows: Callable[[Packages], Iterable[Row]]
    packages: tuple[str, ...]
    trains: bool = True


def fraction_of(*words: object) -> float:
    """A number in [0, 1) that depends on the words alone."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def split_of(*words: object, test: float = 0.1, validation: float = 0.02) -> str:
    """The split of everything that has these words, such as a city or a combination of attributes."""
    fraction = fraction_of("split", *words)
    return "test" if fraction < test else "validation" if fraction < test + validation else "train"


def split_pairs(pairs: Iterable[tuple[str, str]], test: float, validation: float) -> dict[tuple[str, str], str]:
    """A split for each (concept, style): of a fraction of the concepts, one style is never trained.

    A concept of one style trains, so every concept and every style that is tested has been trained.
    """
    styles: dict[str, set[str]] = {}
    for concept, style in pairs:
        styles.setdefault(concept, set()).add(style)
    split: dict[tuple[str, str], str] = {}
    for concept, known in styles.items():
        order = sorted(known, key=lambda style: fraction_of("style", concept, style))
        split |= {(concept, style): "train" for style in order}
        if len(order) > 1:
            split[concept, order[0]] = split_of("pair", concept, test=test, validation=validation)
    return split


def identity(key: str) -> Row:
    """The columns that name the package of a row and its licence."""
    return {"source": PACKAGES[key].source, "license": PACKAGES[key].license}


def write_part(rows: Iterable[Row], path: Path) -> Counter[str]:
    """Write the rows as Parquet and return the number of rows of each split; the same rows make the same bytes."""
    rows = iter(rows)
    first = list(itertools.islice(rows, ROWS_OF_A_GROUP))
    if not first:
        raise ValueError(f"{path.stem} has no rows")
    counts: Counter[str] = Counter()
    # Columns may be missing in the first rows, so all that the part may have are written.
    schema = pa.schema([(name, TYPES[name]) for name in TYPES])
    seen: set[str] = set()
    partial = path.with_suffix(".partial")
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for group in itertools.chain([first], _groups(rows)):
            writer.write_table(pa.Table.from_pylist([_cells(row) for row in group], schema))
            counts.update(row["split"] for row in group)
            ids = [row["id"] for row in group]
            if len(set(ids)) < len(ids) or seen & set(ids):
                raise ValueError(f"{path.stem} holds an id twice: {next(x for x, n in Counter(ids).items() if n > 1)}")
            seen |= set(ids)
    table = pq.read_table(partial)
    table = table.select([name for name in table.column_names if table[name].null_count < len(table)])
    pq.write_table(table, partial, compression="zstd", row_group_size=ROWS_OF_A_GROUP)
    partial.rename(path)
    return counts


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while group := list(itertools.islice(rows, ROWS_OF_A_GROUP)):
        yield group


def _cells(row: Row) -> Row:
    unknown = set(row) - set(TYPES)
    if unknown:
        raise ValueError(f"{row['id']} has columns that no record has: {sorted(unknown)}")
    return {
        name: json.dumps(cell, ensure_ascii=False) if name in MAPPINGS and cell is not None else cell
        for name, cell in row.items()
    }
