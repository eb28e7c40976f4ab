"""A table as a user has it: columns of numbers, words, texts, times and images; written as CSV or as folders."""

# Letters: R rows

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

ColumnKind = Literal["number", "category", "text", "time", "image"]
SPLIT_SEED = 16
TEST_FRACTION, FOLDS = 0.2, 5


@dataclass(frozen=True)
class Frame:
    """Columns of R values each; numbers are floats (NaN: missing), images Pillow images, all others strings.

    `test` marks the rows that the loader itself keeps for testing, if the data has a split of its own.
    """

    columns: Mapping[str, Sequence[Any]]
    kinds: Mapping[str, ColumnKind]
    test: np.ndarray | None = field(default=None)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def names(self, kind: ColumnKind) -> list[str]:
        """Return the names of the columns of a kind."""
        return [name for name, own in self.kinds.items() if own == kind]

    def numbers(self, name: str) -> np.ndarray:
        """Return a column of numbers.  # R"""
        return np.asarray(self.columns[name], float)

    def rows(self, index: Sequence[int] | np.ndarray) -> Frame:
        """Return the rows of these indices, in this order."""
        chosen = [int(row) for row in index]
        return Frame({name: [column[row] for row in chosen] for name, column in self.columns.items()}, self.kinds)

    def without(self, names: Sequence[str]) -> Frame:
        """Return the frame without some columns."""
        kept = [name for name in self.columns if name not in names]
        return Frame({name: self.columns[name] for name in kept}, {name: self.kinds[name] for name in kept}, self.test)


def split(frame: Frame, fold: int = 0) -> tuple[Frame, Frame]:
    """Return training and test rows: the split of the data if it has one, else a fifth at random, always the same.

    fold: which fifth is tested, 0 to 4; that of the data has fold 0 alone
    """
    if frame.test is not None:
        return frame.rows(np.flatnonzero(~frame.test)), frame.rows(np.flatnonzero(frame.test))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(frame))
    count = round(TEST_FRACTION * len(frame))
    tested = slice(fold * count, (fold + 1) * count)
    return frame.rows(np.sort(np.delete(order, tested))), frame.rows(np.sort(order[tested]))


def write_table(frame: Frame, path: Path) -> Path:
    """Write a CSV, with its images as PNG files in a folder beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells: dict[str, list[str]] = {}
    for name, column in frame.columns.items():
        if frame.kinds[name] != "image":
            cells[name] = [_cell(value) for value in column]
            continue
        folder = path.with_name(f"{path.stem}-{name}")
        folder.mkdir(exist_ok=True)
        cells[name] = [f"{folder.name}/{row}.png" for row in range(len(frame))]
        for file, image in zip(cells[name], column, strict=True):
            image.save(path.parent / file)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(cells)
        writer.writerows(zip(*cells.values(), strict=True))
    return path


def write_image_folder(frame: Frame, label: str, folder: Path) -> Path:
    """Write images into one subfolder per label, named by their rows: `cat/12.png`."""
    (image,) = frame.names("image")
    for row, (one, name) in enumerate(zip(frame.columns[image], frame.columns[label], strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        one.save(folder / name / f"{row}.png")
    return folder


def rgb(image: Image.Image, longest: int | None = None) -> Image.Image:
    """Return an image in RGB, transparency over white, shrunk to at most `longest` pixels a side."""
    if image.mode in ("P", "LA"):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    if longest is not None:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return image


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.10g}"
    return str(value)
