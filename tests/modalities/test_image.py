"""Images: what is read from which files, what is refused, how many patches, and where holes lie."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

from openm6.core.config import build
from openm6.core.errors import ConfigError, DataError
from openm6.modalities.batch import build_sequence
from openm6.modalities.codes import FourierPositionEmbedding, PatchAdapter
from openm6.modalities.image import (
    Image,
    ImageConfig,
    augmented,
    box_mask,
    merged,
    pixels,
    random_box,
    read_image,
    squared,
    to_square,
)
from openm6.modalities.interface import Segment, line
from tests.data.sample_images import bomb, png
from tests.sequences import meta_of
from tests.small_model import modalities

PATCH = 8


@pytest.fixture(scope="module")
def image() -> Image:
    found = modalities()["image"]
    assert isinstance(found, Image)
    return found


def file_of(image: PIL.Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    image = PIL.Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 2, 2))
    found = np.asarray(read_image(file_of(image.convert(mode))))
    assert (found[:, 2:] == 255).all(), "the right half is transparent"
    assert (found[:, :2] < 255).any(), "the left half is not"


def test_half_transparent_is_half_white() -> None:
    found = read_image(file_of(PIL.Image.new("RGBA", (1, 1), (0, 0, 0, 128)))).getpixel((0, 0))
    assert all(abs(value - 127) <= 1 for value in found)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_common_formats_are_read(kind: str) -> None:
    found = np.asarray(read_image(file_of(PIL.Image.new("RGB", (9, 5), (250, 120, 10)), kind)))
    assert found.shape == (5, 9, 3)
    assert np.abs(found.astype(int) - (250, 120, 10)).max() < 12


@pytest.mark.parametrize("side", [6000, 20_000, 2_000_000])
def test_a_decompression_bomb_is_refused_from_its_header(side: int) -> None:
    with pytest.raises(DataError, match="over the bound of 32,000,000"):
        read_image(bomb(side))


def test_the_bound_can_be_set() -> None:
    assert read_image(png(side=10), max_pixels=100).size == (10, 10)
    with pytest.raises(DataError, match="11 x 11 pixels, over the bound of 100: shrink it"):
        read_image(png(side=11), max_pixels=100)


@pytest.mark.parametrize(
    "raw",
    [b"", b"hello, I am a text", png()[:30], png()[:-40], None, 5],
    ids=["empty", "text", "header", "cut", "none", "number"],
)
def test_what_is_no_image_is_one_sentence(raw: object) -> None:
    with pytest.raises(DataError, match="broken or of an unknown format") as caught:
        read_image(raw)
    assert "\n" not in str(caught.value)


def test_damaged_files_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    noise = PIL.Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8))
    read = refused = 0
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        whole = file_of(noise, kind)
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 100), 4):
                damaged[place] = rng.integers(0, 256)
            try:
                assert read_image(bytes(damaged)).mode == "RGB"
                read += 1
            except DataError:
                refused += 1
    assert read > 20 and refused > 20, "the test must meet both"


@pytest.mark.parametrize("error", [RuntimeError("Missing image item"), IndexError("index"), NotImplementedError("DDS")])
def test_whatever_a_reader_of_pillow_raises_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise error

    monkeypatch.setattr("openm6.modalities.image.upright", load)
    with pytest.raises(DataError, match=rf"the image is broken.*\({error}\): save it again"):
        read_image(png())


@pytest.mark.parametrize("size", [(64, 64), (8, 8), (3, 3), (1000, 10), (1, 1000), (2000, 1500), (20, 50), (640, 64)])
def test_patches_keep_within_the_budget_and_near_the_aspect(image: Image, size: tuple[int, int]) -> None:
    tokens = image.source(PIL.Image.new("RGB", size))
    down, across = (len(np.unique(tokens.arrays["positions"][:, axis])) for axis in (0, 1))
    assert len(tokens) == down * across <= image.config.max_patches
    assert tokens.span == max(down, across)
    wanted, found = size[0] / size[1], across / down
    if 1 / 8 <= wanted <= 8 and min(size) >= 2 * PATCH:
        assert found == pytest.approx(wanted, rel=0.35)
    assert (across >= down) == (size[0] >= size[1])


def test_patches_are_the_pixels(image: Image) -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    tokens = image.source(values)
    assert len(tokens) == 6
    row, column = 1, 2
    block = values[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    assert np.allclose(tokens.arrays["patches"][row * 3 + column], (block / 127.5 - 1).reshape(-1), atol=1e-6)
    assert tokens.grid[row * 3 + column].tolist() == [0, 24, 26], "the middle, in 32 units a side"


def test_codes_stand_where_the_patches_stand_whatever_lies_between(image: Image) -> None:
    raw = PIL.Image.new("RGB", (64, 64))
    source, wanted = image.source(raw), image.target(raw)
    words = Segment("text", {}, line(7), 7, np.zeros(7, bool))
    laid = meta_of(build_sequence([words, source, words, wanted])).positions[0]
    patches, codes = laid[7 : 7 + len(source)], laid[-len(wanted) :]
    assert len(patches) == len(codes) == 64  # the shipped codec has one place for each patch
    assert np.array_equal(patches[:, 1:], codes[:, 1:])
    assert (codes[:, 0] > patches[:, 0]).all()


def test_a_square_keeps_the_aspect_on_white() -> None:
    square = np.asarray(to_square(PIL.Image.new("RGB", (40, 20), "black"), 64))
    assert (square[:15] == 255).all() and (square[-15:] == 255).all() and (square[20:44] == 0).all()


def test_pixels_lie_between_minus_one_and_one() -> None:
    found = pixels(PIL.Image.fromarray(np.array([[[0, 128, 255]]], np.uint8)))
    assert found[0, 0].tolist() == pytest.approx([-1, 128 / 127.5 - 1, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("mask_box", "touched"),
    [
        (None, []),
        ((0.0, 0.0, 1.0, 1.0), list(range(16))),
        ((0.25, 0.25, 0.75, 0.75), [5, 6, 9, 10]),
        ((0.25, 0.0, 0.5, 0.25), [1]),
        ((0.3, 0.3, 0.31, 0.31), [5]),
        ((0.2, 0.0, 0.3, 0.1), [0, 1]),
        ((0.0, 0.75, 1.0, 1.0), [12, 13, 14, 15]),
    ],
)
def test_a_hole_takes_all_places_it_touches(mask_box: tuple[float, ...] | None, touched: list[int]) -> None:
    assert np.flatnonzero(box_mask(mask_box, 4, 4)).tolist() == touched  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(10))
def test_a_random_hole_is_the_same_box_at_every_raster(seed: int) -> None:
    mask_box = random_box(np.random.default_rng(seed))
    left, top, right, bottom = mask_box
    assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    share = (right - left) * (bottom - top)
    for side in (8, 16, 64):
        assert box_mask(mask_box, side, side).mean() == pytest.approx(share)


def test_a_hole_hides_from_the_source_and_alone_is_learned(image: Image) -> None:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    options = {"mask_box": (0.25, 0.5, 0.75, 1.0)}
    inside = box_mask(options["mask_box"], 8, 8)
    read, wanted = image.source(values, options=options), image.target(values, options=options)
    assert np.array_equal(read.arrays["is_masked"], inside) and np.array_equal(wanted.learn, inside)
    assert (read.arrays["patches"][inside] == 0).all()
    other = values.copy()
    other[32:, 16:48] = 0
    assert np.array_equal(image.source(other, options=options).arrays["patches"], read.arrays["patches"])


@pytest.mark.parametrize("form", ["box", "mask", "small"])
def test_a_box_of_a_wide_image_is_where_its_square_has_it(image: Image, form: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    box = (0.0, 0.0, 1.0, 0.25)
    masks = {
        "box": box,
        "mask": np.arange(32)[:, None] < np.full(64, 8),
        "small": np.arange(8)[:, None] < np.full(16, 2),
    }
    learned = image.target(values, options={"mask_box": masks[form]}).learn.reshape(8, 8)
    assert np.flatnonzero(learned.any(1)).tolist() == [2] and learned[2].all(), "rows 16 to 24 of 64"


def test_the_mask_of_a_thin_image_takes_little_memory() -> None:
    mask = np.zeros((1, 100_000), bool)
    mask[:, 50_000:] = True
    found = squared(mask, 100_000, 1)
    assert isinstance(found, np.ndarray) and max(found.shape) == 2048 and found[:, 1100:].any(1).sum() == 1
    assert not found[:, :1000].any()


def test_what_is_gone_is_one_vector() -> None:
    torch.manual_seed(0)
    adapter = PatchAdapter(FourierPositionEmbedding(8), torch.nn.Linear(12, 8), 8)
    arrays = {
        "patches": torch.randn(4, 12),
        "is_masked": torch.tensor([True, False, True, False]),
        "positions": torch.full((4, 2), 0.5),
    }
    first, second, third, fourth = adapter.embed(arrays)
    assert torch.equal(first, third) and not torch.equal(second, fourth)


def test_augmentation_moves_and_keeps_the_size(image: Image) -> None:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    plain, moved = image.source(values), image.source(values, np.random.default_rng(1))
    assert plain.arrays["patches"].shape == moved.arrays["patches"].shape
    assert not np.array_equal(plain.arrays["patches"], moved.arrays["patches"])


def noise(*size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def with_settings(image: Image, **settings: object) -> Image:
    return Image(image.codec, ImageConfig.model_validate(settings))


def test_small_images_are_enlarged_to_a_number_of_patches(image: Image) -> None:
    large = with_settings(image, min_patches=16, max_patches=36)
    found = [len(large.source(noise(*size))) for size in ((8, 8), (32, 32), (48, 48), (200, 200), (8, 32))]
    assert found == [16, 16, 36, 36, 16]
    assert len(image.source(noise(1, 8))) == 1, "without the setting a small image keeps its size"
    with pytest.raises(ConfigError, match="min_patches=9 is above max_patches=4"):
        build(ImageConfig, {"min_patches": 9, "max_patches": 4}, "modalities.image")


def test_patches_of_sixteen_pixels(image: Image) -> None:
    values = noise(32, 48)
    found = with_settings(image, patch=16).source(values)
    assert (len(found), found.span) == (6, 3)
    assert np.array_equal(found.arrays["patches"][4].reshape(16, 16, 3), pixels(values[16:, 16:32]))


@pytest.mark.parametrize("augmentation", ["slight", "strong"])
def test_augmentation_follows_the_generator_and_leaves_masked_images_alone(image: Image, augmentation: str) -> None:
    one, values = with_settings(image, flips=True, augmentation=augmentation), noise(32, 48)

    def patches(seed: int | None, options: dict[str, object] | None = None) -> np.ndarray:
        rng = None if seed is None else np.random.default_rng(seed)
        return one.source(values, rng, options or {}).arrays["patches"]

    assert np.array_equal(patches(1), patches(1)) and not np.array_equal(patches(1), patches(2))
    assert np.array_equal(patches(None), image.source(values).arrays["patches"])
    hole = {"mask_box": (0.0, 0.0, 0.5, 0.5)}
    assert np.array_equal(patches(1, hole), patches(None, hole))
    assert np.array_equal(patches(1, {"aligned": True}), patches(None))


def test_strong_augmentation_keeps_the_image_in_view(image: Image) -> None:
    values, rng = np.full((48, 64, 3), 255, np.uint8), np.random.default_rng(0)
    values[16:32, 16:48] = (255, 0, 0)
    one = with_settings(image, augmentation="strong")
    seen = [one.source(values, rng).arrays["patches"].reshape(-1, 3) for _ in range(40)]
    red = np.array([(patches[:, 0] > patches[:, 1] + 1).mean() for patches in seen])
    assert red.min() > 0.08 and red.max() < 0.4 and red.std() > 0.02, "a sixth of the image, at other scales"


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (40, 128), (128, 40)])
def test_the_largest_change_of_strong_augmentation_shows_no_black_corner(size: tuple[int, int]) -> None:
    white = np.full((*size, 3), 255, np.uint8)
    for signs in itertools.product((-1.0, 1.0), repeat=5):
        largest: Any = SimpleNamespace(uniform=lambda low, high, count, signs=signs: np.asarray(signs))
        assert augmented(white, ImageConfig(augmentation="strong"), largest).min() == 255


@pytest.mark.parametrize("augmentation", ["slight", "strong"])
def test_half_of_the_images_are_mirrored_only_if_allowed(image: Image, augmentation: str) -> None:
    values = np.zeros((32, 32, 3), np.uint8)
    values[:, 16:] = 255
    for flips, rate in ((False, 0.0), (True, 0.5)):
        one = with_settings(image, flips=flips, augmentation=augmentation)
        rng = np.random.default_rng(0)
        firsts = [one.source(values, rng).arrays["patches"][0].mean() for _ in range(60)]
        assert np.mean(np.array(firsts) > 0) == pytest.approx(rate, abs=0.15)


def test_a_file_seen_before_gives_the_same_codes(image: Image) -> None:
    raw = png("green", 64)
    first = image.encode(raw).copy()
    assert np.array_equal(image.encode(raw), first)
    assert np.array_equal(image.encode(read_image(raw)), first), "remembered or not must be the same"


def test_an_image_survives_the_codec_roughly(image: Image) -> None:
    red = image.decode(torch.from_numpy(image.encode(png("red", 64)).astype(np.int64)))
    assert np.abs(np.asarray(red).astype(int) - (255, 0, 0)).mean() < 30


def test_a_blank_is_all_hidden(image: Image) -> None:
    tokens = image.blank()
    assert len(tokens) == len(image.target_grid.cells) and tokens.arrays["is_masked"].all()


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    levels = np.array([[0, 32768], [65535, 16384]], np.uint16)
    shades = np.asarray(read_image(file_of(PIL.Image.fromarray(levels))))[..., 0]
    assert np.abs(shades - np.array([[0, 127.5], [255, 63.8]])).max() <= 1


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    stream = io.BytesIO()
    PIL.Image.fromarray(noise(16, 16)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    assert read_image(data).size == (16, 16)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    with pytest.raises(DataError, match="more than 100 scans"):
        read_image(data[:end] + 200 * data[last:end] + data[end:])


def test_a_photograph_stands_as_the_camera_was_held() -> None:
    image = PIL.Image.new("RGB", (4, 2), "white")
    tags = image.getexif()
    tags[0x0112] = 6  # turned by a quarter
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=tags)
    assert read_image(stream.getvalue()).size == (2, 4)


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_that_of_pillow_and_other_tags_may_be_broken(turn: int) -> None:
    image = PIL.Image.fromarray(noise(6, 4))
    tags = image.getexif()
    tags[0x0112] = turn
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=tags)
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(stream))
    scan = io.BytesIO()
    image.save(scan, "TIFF", exif=tags)
    assert np.array_equal(read_image(scan.getvalue()), expected.convert("RGB")), "a TIFF turns itself"
    assert expected is not None and np.array_equal(read_image(stream.getvalue()), expected)
    image.getexif()[0x0111] = 2**40  # no value of this tag
    image.getexif()[0x0112] = turn
    assert np.array_equal(read_image(image), expected)


def photograph(width: int, height: int) -> PIL.Image.Image:
    """Something as smooth as photographs are: noise at 1/50 of the size, enlarged."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 50, width // 50, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(1600, 1200), (1080, 1920), (1500, 1500), (1591, 803)])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(image: Image, size: tuple[int, int]) -> None:
    raw = file_of(photograph(*size), "JPEG")
    small = read_image(raw, target_pixels=64 * 64)
    assert 4 * 64 * 64 <= small.width * small.height < size[0] * size[1] / 10
    assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.02)
    whole = image.source(read_image(raw)).arrays["patches"]
    found = image.source(raw).arrays["patches"]
    assert found.shape == whole.shape
    assert np.abs(found - whole).mean() < 0.005 and np.abs(found - whole).max() < 0.04  # of 2
    squares = [np.asarray(to_square(image, 64), np.float32) for image in (small, read_image(raw))]
    assert np.abs(squares[0] - squares[1]).mean() < 0.6  # of 255


@pytest.mark.parametrize(("kind", "side"), [("PNG", 1000), ("WEBP", 1000), ("JPEG", 100)])
def test_what_is_small_or_no_jpeg_is_decoded_whole(kind: str, side: int) -> None:
    assert read_image(file_of(photograph(side, side), kind), target_pixels=64 * 64).size == (side, side)


def test_a_jpeg_that_is_decoded_small_stands_as_the_camera_was_held() -> None:
    image = photograph(1591, 800)
    tags = image.getexif()
    tags[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=tags)
    assert read_image(stream.getvalue(), target_pixels=64 * 64).size == (100, 199)


def test_tokens_of_an_encoder_are_merged_in_squares() -> None:
    features = np.arange(3 * 5 * 2, dtype=np.float16).reshape(3, 5, 2)
    found = merged(features, 2)
    assert found.shape == (2, 3, 8)
    np.testing.assert_array_equal(found[0, 1], features[:2, 2:4].reshape(-1))
    np.testing.assert_array_equal(found[1, 2], [*features[2, 4], *[0] * 6])
    np.testing.assert_array_equal(merged(features, 1), features)
    with pytest.raises(ConfigError, match="spatial_merge_size=2 is for an encoder"):
        build(ImageConfig, {"spatial_merge_size": 2}, "here")
