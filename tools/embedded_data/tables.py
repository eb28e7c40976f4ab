"""The schema that all embedded data shares, its splits, and reading, writing and comparing the files."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image

Row = dict[str, Any]
TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "source", "license", "split", "kind")),
        ("image", pa.binary()),
        ("image_w", pa.int32()),
        ("image_h", pa.int32()),
        ("audio", pa.binary()),
        ("audio_sr", pa.int32()),
        ("audio_sec", pa.float32()),
        ("text_en", pa.string()),
        ("text_zh", pa.string()),
        ("tags_en", TEXTS),
        ("tags_zh", TEXTS),
        ("label", pa.string()),
        ("label_zh", pa.string()),
        ("label_id", pa.int32()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("choices", TEXTS),
        ("num_names", TEXTS),
        ("num_values", pa.list_(pa.float64())),
        ("extra", pa.string()),
    ]
)
NOISE = 0.2  # of the root mean square: one of the voices breathes, and its breath is random


def split_of(key: str, tenths: int = 1) -> str:
    """`test` for so many tenths of all keys, by a hash that never changes."""
    number = int.from_bytes(hashlib.sha1(key.encode()).digest(), "big")
    return "test" if number % 10 < tenths else "train"


def table_of(rows: Iterable[Row], schema: pa.Schema = SCHEMA) -> pa.Table:
    """Rows as a table of a schema; keys that a row lacks are null."""
    return pa.Table.from_pylist(list(rows), schema=schema)


def write(table: pa.Table, path: Path) -> None:
    """Writes a Parquet file without a time stamp, so that equal rows give equal bytes under one pyarrow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", compression_level=19, write_statistics=False)


def differences(built: pa.Table, path: Path) -> list[str]:
    """How a built table differs from the file: images by pixels, audio clips but for breath, the rest exactly."""
    known = pq.read_table(path)
    if built.num_rows != known.num_rows or built.column_names != known.column_names:
        return [
            f"{path.name}: {built.num_rows} rows {built.column_names} against {known.num_rows} {known.column_names}"
        ]
    return [
        f"{path.name} row {number}: {name}"
        for number, (ours, theirs) in enumerate(zip(built.to_pylist(), known.to_pylist(), strict=True))
        for name in ours
        if not _same(name, ours[name], theirs[name])
    ]


def _same(name: str, ours: Any, theirs: Any) -> bool:
    if ours == theirs or ours is None or theirs is None:
        return bool(ours == theirs)
    if name == "image":
        return _pixels(ours).shape == _pixels(theirs).shape and bool((_pixels(ours) == _pixels(theirs)).all())
    if name == "audio":
        first, second = _samples(ours), _samples(theirs)
        return first.shape == second.shape and bool(np.std(first - second) <= NOISE * np.std(second))
    return False


def _pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _samples(content: bytes) -> np.ndarray:
    return np.asarray(soundfile.read(io.BytesIO(content))[0])
