"""What can be done to a picture by formula, so that a model can learn it: outlines, styles, other backgrounds."""

# Letters: H and W pixels down and across

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image as Pillow
from PIL import ImageFilter, ImageOps

Style = Callable[[Pillow.Image], Pillow.Image]
WHITE_ENOUGH = 235  # a background photographed or drawn as white

BACKGROUNDS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "red": ("红色", (214, 64, 56)),
    "orange": ("橙色", (240, 150, 50)),
    "yellow": ("黄色", (246, 214, 80)),
    "green": ("绿色", (84, 168, 90)),
    "blue": ("蓝色", (66, 120, 206)),
    "purple": ("紫色", (140, 92, 186)),
    "grey": ("灰色", (150, 150, 150)),
    "black": ("黑色", (24, 24, 24)),
}


def outlined(picture: Pillow.Image) -> Pillow.Image:
    """Dark lines on white where the picture changes."""
    edges = ImageOps.grayscale(picture).filter(ImageFilter.FIND_EDGES)
    framed = ImageOps.expand(ImageOps.crop(edges, 1), 1, 0)  # the filter takes the border for an edge
    return ImageOps.invert(ImageOps.autocontrast(framed)).convert("RGB")


def _toned(dark: str, light: str) -> Style:
    return lambda picture: ImageOps.colorize(ImageOps.grayscale(picture), dark, light)


def _posterised(picture: Pillow.Image) -> Pillow.Image:
    return ImageOps.posterize(picture, 2)


STYLES: dict[str, Style] = {
    "ink": _toned("#101418", "#ffffff"),
    "blueprint": _toned("#dfe9ff", "#14418b"),
    "sepia": _toned("#3b2410", "#f6e6c8"),
    "rose": _toned("#5a0f30", "#ffe3ec"),
    "forest": _toned("#0c2f1c", "#e4f5dd"),
    "negative": ImageOps.invert,
    "poster": _posterised,
}


def blended(first: Pillow.Image, second: Pillow.Image) -> Pillow.Image:
    """Half of each."""
    return Pillow.blend(first, second, 0.5)


def on_background(picture: Pillow.Image, colour: tuple[int, int, int]) -> Pillow.Image:
    """The white that reaches the border replaced by a colour; white inside stays."""
    values = np.array(picture)
    values[_outside(values.min(2) >= WHITE_ENOUGH)] = colour
    return Pillow.fromarray(values)


def _outside(white: np.ndarray) -> np.ndarray:
    """The part of a mask that is joined to its border.  # H W bool"""
    found = np.zeros_like(white)
    found[[0, -1], :], found[:, [0, -1]] = white[[0, -1], :], white[:, [0, -1]]
    while True:
        grown = found.copy()
        grown[1:] |= found[:-1]
        grown[:-1] |= found[1:]
        grown[:, 1:] |= found[:, :-1]
        grown[:, :-1] |= found[:, 1:]
        grown &= white
        if (grown == found).all():
            return found
        found = grown
