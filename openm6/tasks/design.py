"""Targets of image editing, computed from one image: sketches, styles, backgrounds."""

# Letters: H and W pixels down and across

import io
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from openm6.modalities.image import read_image
from openm6.modalities.interface import Part
from openm6.tasks.slots import IMAGE, Built, Context, Derived, Record

Style = Callable[[Image.Image], Image.Image]
MAX_SIDE = 256  # larger images are shrunk first
MIN_WHITE = 235  # of each channel of a white background
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


def _toned(dark: str, light: str) -> Style:
    return lambda image: ImageOps.colorize(ImageOps.grayscale(image), dark, light)


STYLES: dict[str, Style] = {
    "ink": _toned("#101418", "#ffffff"),
    "blueprint": _toned("#dfe9ff", "#14418b"),
    "sepia": _toned("#3b2410", "#f6e6c8"),
    "rose": _toned("#5a0f30", "#ffe3ec"),
    "forest": _toned("#0c2f1c", "#e4f5dd"),
    "negative": ImageOps.invert,
    "poster": lambda image: ImageOps.posterize(image, 2),
}


def outline(image: Image.Image) -> Image.Image:
    """Dark lines on white along the edges of an image."""
    lines = np.array(ImageOps.grayscale(image).filter(ImageFilter.FIND_EDGES))
    # The filter takes the border for an edge.
    lines[[0, -1]], lines[:, [0, -1]] = 0, 0
    return ImageOps.invert(ImageOps.autocontrast(Image.fromarray(lines))).convert("RGB")


def on_background(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The white that reaches the border replaced by a colour; white inside stays."""
    values = np.array(image)
    white = values.min(2) >= MIN_WHITE  # H W
    # Grows from the frame around the image, by one pixel each time.
    found = np.pad(np.zeros_like(white), 1, constant_values=True)
    while True:
        near = found[:-2, 1:-1] | found[2:, 1:-1] | found[1:-1, :-2] | found[1:-1, 2:]
        if not (grown := white & near & ~found[1:-1, 1:-1]).any():
            break
        found[1:-1, 1:-1] |= grown
    values[found[1:-1, 1:-1]] = colour
    return Image.fromarray(values)


def _read(raw: bytes) -> Image.Image:
    image = read_image(raw)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _part(image: Image.Image) -> Part:
    """The image as a file: caches of codes are keyed by bytes."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return Part("image", stream.getvalue())


class Outline(Derived):
    def part(self, record: Record, language: str) -> Part:
        return _part(outline(_read(record["image"])))


def restyle(record: Record, context: Context, names: Sequence[str]) -> Built:
    """Images of other records, if any, in random styles, by these names, and the own image in the styles' mean."""
    known = sorted(STYLES)
    styles = [STYLES[known[int(index)]] for index in context.rng.permutation(len(known))[: len(names)]]
    images = [other["image"] for other in record.get("others", ()) if other.get("image")] or [record["image"]]
    shown = (_part(style(_read(images[index % len(images)]))) for index, style in enumerate(styles))
    image = _read(record["image"])
    styled = [style(image) for style in styles]
    target = styled[0] if len(styled) == 1 else Image.blend(styled[0], styled[1], 0.5)
    return Built(dict(zip(names, shown, strict=True)), _part(target))


def background_replacement(record: Record, context: Context) -> Built:
    """The name of a random colour, and the record's image on a background of it."""
    names = sorted(BACKGROUNDS)
    name = names[int(context.rng.integers(len(names)))]
    chinese, colour = BACKGROUNDS[name]
    target = _part(on_background(_read(record["image"]), colour))
    word = Part("text", name if context.language == "en" else chinese)
    return Built({"colour": word}, target)


SLOTS = {
    "outline": Outline("image", needs=IMAGE.present),
    "restyled_image": Derived("image", partial(restyle, names=("reference",))),
    "mixed_styles": Derived("image", partial(restyle, names=("reference", "second"))),
    "new_background": Derived("image", background_replacement),
}
