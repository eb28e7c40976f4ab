"""What is done to images by formula: lines where something changes, colours behind and not within."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from openm6.modalities.image import read_image
from openm6.tasks.design import BACKGROUNDS, STYLES, on_background, outline
from openm6.tasks.registry import TASKS
from tests.small_model import demo_sources


def ring() -> Image.Image:
    """A dark square with a white one inside, on white."""
    values = np.full((32, 32, 3), 255, np.uint8)
    values[8:24, 8:24] = (20, 40, 160)
    values[12:20, 12:20] = 255
    return Image.fromarray(values)


def test_an_outline_is_dark_at_edges_and_white_elsewhere() -> None:
    lines = np.asarray(outline(ring())).min(2)
    assert lines.shape == (32, 32) and lines[7, 15] < 128
    assert (lines[:6] == 255).all() and lines[0, 0] == 255 and lines[10, 10] == 255


@pytest.mark.parametrize("size", [(1, 1), (256, 1), (1, 5), (2, 3)])
def test_an_image_of_a_pixel_has_an_outline(size: tuple[int, int]) -> None:
    assert np.array_equal(np.asarray(outline(Image.new("RGB", size, "red"))), np.full((*size[::-1], 3), 255))


def test_a_background_reaches_the_border_and_leaves_white_inside() -> None:
    colour = BACKGROUNDS["blue"][1]
    values = np.asarray(on_background(ring(), colour))
    assert (values[0, 0] == colour).all() and (values[31, 16] == colour).all()
    assert (values[15, 15] == 255).all() and (values[9, 9] == (20, 40, 160)).all()


def test_an_image_without_white_keeps_its_background() -> None:
    grey = Image.new("RGB", (8, 8), (90, 90, 90))
    assert np.array_equal(np.asarray(on_background(grey, (1, 2, 3))), np.asarray(grey))


@pytest.mark.parametrize("name", STYLES)
def test_each_style_changes_an_image_and_keeps_its_size(name: str) -> None:
    image = read_image(demo_sources()["emoji"][0]["image"])
    styled = STYLES[name](image)
    assert styled.size == image.size and styled.mode == "RGB"
    assert np.abs(np.asarray(styled, int) - np.asarray(image, int)).mean() > 5


def test_a_mixture_lies_in_the_middle_of_its_styles() -> None:
    record = demo_sources()["emoji"][5]
    other = {"image": record["image"], "en": None, "zh": None}
    example = TASKS["style_mixing"].example({**record, "others": [other]}, np.random.default_rng(0))
    images = [part.raw for part in example.source if part.modality == "image"][1:]
    first, second, mixed = (np.asarray(read_image(raw), int) for raw in (*images, example.target.raw))
    assert np.abs(mixed - (first + second) / 2).max() <= 1 and (first != second).any()


def test_the_reference_has_the_style_that_is_wanted() -> None:
    """The same image as content and as reference, so both must come out alike."""
    record = demo_sources()["emoji"][5]
    other = {"image": record["image"], "en": None, "zh": None}
    for seed in range(5):
        example = TASKS["style_transfer"].example({**record, "others": [other]}, np.random.default_rng(seed))
        reference = [part for part in example.source if part.modality == "image"][1]
        assert reference.raw == example.target.raw != record["image"]


def test_the_colour_named_is_the_colour_behind() -> None:
    record = demo_sources()["emoji"][3]
    for seed in range(8):
        example = TASKS["background_replacement"].example(record, np.random.default_rng(seed))
        named = example.source[-1].raw.split()[-1].removeprefix("背景：")
        colours = {word: rgb for name, (chinese, rgb) in BACKGROUNDS.items() for word in (name, chinese)}
        corner = np.asarray(read_image(example.target.raw))[0, 0]
        assert tuple(corner) == colours[named]
