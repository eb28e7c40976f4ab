"""Images of the corpus that the encoder of images is trained to classify.

Classes are the names and styles of icons and emoji, the attributes of faces, and digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.codecs.pixel_encoder import PixelEncoder, PixelEncoderConfig
from openm6.data.parquet import EmbeddedConfig, ParquetConfig
from openm6.data.records import Record
from openm6.data.source import Source, Split
from openm6.data.sources import open_sources
from openm6.modalities.image import read_image, to_square
from tools.mini.labelled import Heads, numbered
from tools.mini.networks import NONE, attributes_by_style

# Letters: B images, S side in pixels

Pair = tuple[str, str]
"""The name and the style of an icon or emoji."""


def open_part(corpus: Path, part: str, split: Split) -> Source:
    """Return a part of the corpus, or the digits that come with the package."""
    digits = part == "digits"
    config = EmbeddedConfig(name=part) if digits else ParquetConfig(path=str(corpus / f"{part}.parquet"))
    return open_sources({part: config}, split)[part]


def pair_of(record: Record) -> Pair:
    return record["label"], record["extra"]["style_en"]


def tested_pairs(corpus: Path) -> set[Pair]:
    """Return the pairs of things that are not trained: other parts hold some of them among their training records."""
    splits: tuple[Split, ...] = ("validation", "test")
    sources = [open_part(corpus, "things", split) for split in splits]
    return {pair_of(source[index]) for source in sources for index in range(len(source))}


def classes_of(part: str, record: Record, attributes: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Return the classes of an image by what they say of it; a face may lack attributes of its style."""
    if part == "digits":
        return {"digit": record["label"]}
    if part == "avatars":
        own = record["categories"]
        return {"family": own["style"]} | {name: own.get(name, NONE) for name in attributes[own["style"]]}
    name, style = pair_of(record)
    return {"name": name, "style": style}


class LabelledImages:
    """The images of a split as squares, their parts, and the numbers of their classes by head."""

    WEIGHTS: ClassVar[Mapping[str, float]] = {"things": 5.0, "icons": 1.0, "emoji": 0.8, "avatars": 0.8, "digits": 0.3}

    def __init__(self, corpus: Path, split: Split, heads: Heads | None = None) -> None:
        tested = tested_pairs(corpus) if split == "train" else set()
        attributes = attributes_by_style(open_part(corpus, "avatars", "train").values("categories"))
        side = PixelEncoderConfig().side
        squares: list[np.ndarray] = []
        self.parts: list[str] = []
        classes: list[dict[str, str]] = []
        for part in self.WEIGHTS:
            source = open_part(corpus, part, split)
            for index in range(len(source)):
                record = source[index]
                if part in ("icons", "emoji") and pair_of(record) in tested:
                    continue
                squares.append(np.asarray(to_square(read_image(record["image"]), side)))
                self.parts.append(part)
                classes.append(classes_of(part, record, attributes))
        self.squares = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()  # B 3 S S
        self.heads, self.classes = numbered(classes, heads)
        self.is_face = torch.tensor([part == "avatars" for part in self.parts])

    @staticmethod
    def encoder() -> PixelEncoder:
        return PixelEncoder(PixelEncoderConfig())

    def inputs(self, rows: Tensor) -> Tensor:
        return self.squares[rows].float() / 127.5 - 1

    def changed(self, rows: Tensor, rng: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return images as others would be; those whose colours were taken away have lost their style."""
        found, is_grey = changed(self.inputs(rows), self.is_face[rows], rng)
        return found, {"style": is_grey}


def changed(images: Tensor, is_face: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images at other places, sizes and angles, in other colours, and which of them are grey.  # B 3 S S -> B 3 S S, B

    A face is only moved and brightened a little: a mouth is a few pixels, and its colours are classes.
    """
    count, _, side, _ = images.shape
    reach = torch.where(is_face, 0.25, 1.0)

    def uniform(extent: float, *sizes: int) -> Tensor:
        return extent * (2 * torch.rand(count, *sizes, generator=rng) - 1)

    scale, aspect, angle = (torch.exp(uniform(0.25) * reach), torch.exp(uniform(0.12) * reach), uniform(0.2) * reach)
    angle = torch.where(is_face, 0.0, angle)
    shift = uniform(0.2, 2) * torch.where(is_face, 0.6, 1.0)[:, None]  # of half a side
    rows = torch.stack((scale * aspect * angle.cos(), -scale * angle.sin(), shift[:, 0]), 1)
    below = torch.stack((scale * angle.sin(), scale / aspect * angle.cos(), shift[:, 1]), 1)
    grid = F.affine_grid(torch.stack((rows, below), 1), [count, 3, side, side], align_corners=False)
    found = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    is_grey = ~is_face & (torch.rand(count, generator=rng) < 0.2)
    found = torch.where(is_grey[:, None, None, None], found.mean(1, keepdim=True), found)
    tint = 1 + uniform(0.25, 3, 1, 1) * torch.where(is_face, 0.0, 1.0)[:, None, None, None]
    found = found * tint * (0.975 + uniform(0.125, 1, 1, 1)) + 0.04 * torch.randn(found.shape, generator=rng)
    # Random erasing (arXiv 1708.04896) of a box of things, at most a third of a side.
    middle, extent = uniform(1.0, 2, 1), (uniform(0.33, 2, 1).abs() * ~is_face[:, None, None])
    at = torch.linspace(-1, 1, side)
    inside = (at - middle).abs() < extent  # B 2 S
    erased = inside[:, 0, :, None] & inside[:, 1, None, :]
    return torch.where(erased[:, None], uniform(1.0, 3, 1, 1), found), is_grey
