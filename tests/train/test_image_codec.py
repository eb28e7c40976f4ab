"""Training images and image scores: repeatable, in range, and right on known cases."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from openm6.codecs.image import ImageCodec, ImageCodecConfig
from openm6.train.codec import DeviceRng, draw_weights
from openm6.train.image_codec import (
    ImageSubject,
    background_mask,
    drawn_images,
    image_scores,
    psnr,
    read_small,
    recolour,
    ssim,
    to_pixels,
    warp,
)
from tests.train.test_codec import image_recipe

CPU = torch.device("cpu")


def plain(*colour: int) -> Image.Image:
    return Image.new("RGB", (32, 32), colour)


def png(colour: tuple[int, ...], side: int = 32, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def smooth(count: int, side: int = 32) -> torch.Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def test_images_are_decoded_on_white_and_resized() -> None:
    images = to_pixels([read_small(png((255, 0, 0)), 64), read_small(png((0, 0, 0, 0), 20, "RGBA"), 64)], 16)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    assert images[0, :, 8, 8].tolist() == [255, 0, 0]
    assert (images[1] == 255).all()


def test_large_images_are_shrunk_when_read_and_small_ones_kept() -> None:
    assert read_small(png((1, 2, 3), 100), 64).size == (64, 64)
    assert read_small(png((1, 2, 3), 32), 64).size == (32, 32)


def test_weights_are_per_source_and_others_count_by_their_size() -> None:
    sizes = {"few": [1.0], "many": [1.0] * 9}
    assert draw_weights(sizes, {}).tolist() == [1.0] * 10
    weights = draw_weights(sizes, {"few": 0.5, "many": 0.5})
    assert weights[0] == pytest.approx(float(weights[1:].sum()))


def test_a_seed_gives_the_same_batch_and_another_seed_another() -> None:
    recipe = image_recipe(data={"batch": 8, "sides": {32: 0.5, 16: 0.5}, "drawn": 0.25})
    subject = ImageSubject(recipe, CPU)
    batches = [subject.draw(seed) for seed in range(12)]
    assert {batch.shape[-1] for batch in batches} == {32, 16}
    assert all(batch.shape[0] == 8 and batch.abs().max() <= 1 for batch in batches)
    assert torch.equal(batches[3], subject.draw(3))
    assert all(not torch.equal(batches[0], other) for other in batches[1:] if other.shape == batches[0].shape)


def test_unwarped_images_only_move_by_whole_pixels_and_mirror() -> None:
    images = torch.rand(64, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    moved = warp(images, 0.0, DeviceRng(1, CPU))
    for before, after in zip(images, moved, strict=True):
        known = before.flatten()
        nearest = (after.flatten()[:, None] - known[None]).abs().min(1).values
        assert nearest.max() < 1e-4  # no new values: nothing was blurred
    assert not torch.allclose(moved, images)


def test_only_white_that_reaches_the_border_is_background() -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[..., :3, :] = 1.0  # white at the top
    image[..., 5, 4] = 1.0  # a white dot inside black
    mask = background_mask(image)[0, 0]
    assert mask[:3].all() and mask[3:].sum() == 0


def test_recolouring_keeps_the_range_and_leaves_the_other_images_alone() -> None:
    images = smooth(64)
    changed = recolour(images, 0.5, DeviceRng(2, CPU))
    same = (changed == images).flatten(1).all(1)
    assert 16 < int(same.sum()) < 48
    assert changed.min() >= 0 and changed.max() <= 1
    assert torch.equal(recolour(images, 0.0, DeviceRng(2, CPU)), images)


def test_drawn_images_have_edges_and_differ() -> None:
    images = drawn_images(16, 32, DeviceRng(3, CPU))
    assert images.shape == (16, 3, 32, 32)
    assert images.min() >= 0 and images.max() <= 1
    assert (images.flatten(1).std(1) > 0.01).sum() >= 14
    assert not torch.allclose(images[0], images[1], atol=0.1)


def test_the_loss_is_zero_for_a_perfect_copy_and_grows_with_the_error() -> None:
    subject = ImageSubject(image_recipe(), CPU)
    target = smooth(4) * 2 - 1
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    assert subject.loss(target, target, False) == 0
    for settling in (False, True):
        losses = [float(subject.loss(target, target + size * noise, settling)) for size in (0.0, 0.05, 0.2)]
        assert losses == sorted(losses) and losses[0] < losses[2]


def test_the_settling_loss_falls_as_the_mean_psnr_rises() -> None:
    subject = ImageSubject(image_recipe(), CPU)
    target, output = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    output[0], output[1] = 0.5, 1.0
    squares = torch.tensor([0.25, 1.0])
    assert float(subject.loss(target, output, True)) == pytest.approx(float((squares + 1e-3).log().mean()), rel=1e-4)


def test_edges_are_judged_apart_from_levels() -> None:
    """Of a constant error, only its size counts; blurring costs more than its size."""
    subject, target = ImageSubject(image_recipe(), CPU), smooth(1)
    sizes = 0.3 + 0.5 * 0.09 + 2 * 0.25 * 0.3
    assert float(subject.loss(target, target + 0.3, False)) == pytest.approx(sizes, rel=1e-4)
    stripes = target + 0.3 * (torch.arange(32) % 2 * 2 - 1)
    # Next to each other, errors of 0.3 and -0.3 differ by 0.6 along one of two axes; a coarse image has none.
    assert float(subject.loss(target, stripes, False)) == pytest.approx(0.3 + 0.5 * 0.09 + 0.5 * 0.3, rel=1e-4)


def test_psnr_is_the_textbook_figure() -> None:
    target = torch.zeros(1, 3, 16, 16)
    assert float(psnr(target, target + 0.2)) == pytest.approx(-20 * math.log10(0.1), abs=1e-4)
    assert float(psnr(target, target)) > 90


def test_ssim_agrees_with_a_slow_reference() -> None:
    first = smooth(1)
    second = (first + 0.1 * torch.randn(first.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    kernel = np.outer(line, line) / line.sum() ** 2
    values = []
    for a, b in zip(first[0].numpy(), second[0].numpy(), strict=True):
        for row in range(22):
            for column in range(22):
                x, y = a[row : row + 11, column : column + 11], b[row : row + 11, column : column + 11]
                mx, my = (kernel * x).sum(), (kernel * y).sum()
                vx, vy = (kernel * x * x).sum() - mx**2, (kernel * y * y).sum() - my**2
                cov = (kernel * x * y).sum() - mx * my
                values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert float(ssim(first * 2 - 1, second * 2 - 1)) == pytest.approx(np.mean(values), abs=1e-3)
    assert float(ssim(first * 2 - 1, first * 2 - 1)) == pytest.approx(1.0, abs=1e-4)


def test_scores_are_a_mean_over_images_whatever_the_batch() -> None:
    torch.manual_seed(0)
    config = ImageCodecConfig(groups=1, widths=(16,), encoder_blocks=(1,), decoder_blocks=(1,))
    codec = ImageCodec(config).eval()
    images = (smooth(70, 16) * 255).byte()
    scores = image_scores(codec, images)
    alone = [image_scores(codec, image[None])["psnr"] for image in images[::23]]
    assert min(alone) - 3 < scores["psnr"] < max(alone) + 3
    assert 0 <= scores["bits"] <= math.log2(1000)
