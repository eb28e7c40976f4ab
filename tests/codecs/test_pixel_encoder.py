"""The encoder of squares of pixels: fused as unfused, summaries, files, and what a mask hides."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from openm6.codecs.pixel_encoder import PixelEncoder, PixelEncoderConfig
from openm6.codecs.registry import load_codec, load_encoder, save_codec
from openm6.core.config import build
from openm6.core.errors import CheckpointError, ConfigError
from openm6.modalities.image import Image, ImageConfig

SMALL = PixelEncoderConfig(channels=(4, 6, 8), width=16, layers=1, queries=4)


def trained() -> PixelEncoder:
    """An encoder whose batch norms have seen inputs."""
    torch.manual_seed(0)
    encoder = PixelEncoder(SMALL).train()
    for _ in range(4):
        encoder.features(2 * torch.rand(8, 3, 64, 64) - 1)
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder() -> PixelEncoder:
    found = trained()
    found.fuse()
    return found.requires_grad_(False)


def squares(*colours: str) -> PIL.Image.Image:
    """An image of 16 squares of 16 pixels, in these colours in turn."""
    image = PIL.Image.new("RGB", (64, 64))
    for number in range(16):
        corner = 16 * (number % 4), 16 * (number // 4)
        image.paste(PIL.Image.new("RGB", (16, 16), colours[number % len(colours)]), corner)
    return image


def test_fused_convolutions_compute_the_same() -> None:
    unfused = trained()
    fused = copy.deepcopy(unfused)
    fused.fuse()
    assert not any(isinstance(one, torch.nn.BatchNorm2d) for one in fused.modules())
    images = 2 * torch.rand(2, 3, 64, 64) - 1
    assert torch.allclose(fused.features(images), unfused.features(images), atol=1e-5)


def test_tokens_stand_as_in_the_image_and_rows_of_summaries_below(encoder: PixelEncoder) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (64, 64, 3)).astype(np.float32)
    found = encoder(values)
    features = encoder.features(torch.from_numpy(values).permute(2, 0, 1)[None])
    assert found.shape == (4 + 1, 4, SMALL.width) and found.dtype == np.float16
    for number in range(16):
        assert np.allclose(found[number // 4, number % 4], features[0, :, number], atol=1e-2)
    assert np.allclose(found[4], encoder.summaries(features)[0].T, atol=1e-2)


def test_a_file_holds_the_encoder(encoder: PixelEncoder, tmp_path: Path) -> None:
    save_codec(encoder, tmp_path / "own.safetensors", torch.float32)
    again = load_encoder(str(tmp_path / "own.safetensors"), "image")
    values = np.zeros((64, 64, 3), np.float32)
    assert np.array_equal(again(values), encoder(values))
    assert not again.training and not any(one.requires_grad for one in again.parameters())
    with pytest.raises(CheckpointError, match="holds no audio encoder"):
        load_encoder(str(tmp_path / "own.safetensors"), "audio")


@pytest.mark.parametrize(
    ("settings", "message"), [({"side": 72}, "side=72 is no multiple of 16"), ({"queries": 3}, "rows of 4 tokens")]
)
def test_a_wrong_config_is_one_sentence(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(PixelEncoderConfig, settings, "settings")


def test_images_of_any_shape_are_read_as_squares(encoder: PixelEncoder) -> None:
    image = Image(load_codec("image-64"), ImageConfig(encoder="own"), encoder)
    assert image.encoder is None and image.patch_size == SMALL.width
    wide = PIL.Image.new("RGB", (64, 32), "red")
    square = PIL.Image.new("RGB", (64, 64), "white")
    square.paste(wide, (0, 16))
    first, second = (image.source(one).arrays["patches"] for one in (wide, square))
    assert first.shape == (20, SMALL.width) and np.array_equal(first, second)
    changed = image.source(squares("red", "blue", "white"), np.random.default_rng(1)).arrays["patches"]
    assert not np.array_equal(changed, image.source(squares("red", "blue", "white")).arrays["patches"])


def test_a_masked_region_does_not_show(encoder: PixelEncoder) -> None:
    image = Image(load_codec("image-64"), ImageConfig(encoder="own"), encoder)
    one, other = squares("red", "blue", "white"), squares("red", "blue", "white")
    other.paste(PIL.Image.new("RGB", (32, 32), "green"), (0, 32))
    box = {"mask_box": (0.0, 0.5, 0.5, 1.0)}
    first, second = (image.source(given, options=box).arrays for given in (one, other))
    is_masked = first["is_masked"].reshape(5, 4)
    assert is_masked[2:4, :2].all() and is_masked.sum() == 4, "summaries are of all that is seen"
    assert np.array_equal(first["patches"], second["patches"])
    assert not np.array_equal(image.source(other).arrays["patches"], image.source(one).arrays["patches"])


def test_its_tokens_are_not_merged(encoder: PixelEncoder) -> None:
    with pytest.raises(ConfigError, match="spatial_merge_size=2 .* than own: leave it out"):
        Image(load_codec("image-64"), ImageConfig(encoder="own", spatial_merge_size=2), encoder)
