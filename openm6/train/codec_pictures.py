"""What a picture codec learns from and by: pictures kept and changed on the device, the loss, and the scores."""

# Letters: B batch, N pictures, S side in pixels

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from pydantic import Field
from torch import Tensor

from openm6.base.config import Config
from openm6.codecs.base import Codec, code_bits
from openm6.modalities.image import read_image, to_square
from openm6.train.dice import Dice
from openm6.train.picture_augment import backdrop, background_mask, drawn_pictures, recolour, warp

ALMOST_EXACT = 1e-3  # squared error (of a range of 2) below which a picture no longer pulls: 36 dB


class PictureLessonsConfig(Config):
    """How training pictures are drawn: batch size, sides in pixels with their shares, and how much is changed.

    `drawn` is the share made of random shapes; of the rest, `warped` are turned and resized (others only moved by
    whole pixels), `composed` get another backdrop, `recoloured` other colours. `shares` weighs the sources.
    """

    batch: int = Field(default=256, ge=2)
    sides: dict[int, float] = Field(default={64: 0.85, 32: 0.15}, min_length=1)
    shares: dict[str, float] = Field(default={})
    drawn: float = Field(default=0.2, ge=0, lt=1)
    warped: float = Field(default=0.5, ge=0, le=1)
    composed: float = Field(default=0.35, ge=0, le=1)
    recoloured: float = Field(default=0.35, ge=0, le=1)


@dataclass(frozen=True)
class Bank:
    """Pictures of one side, where their backgrounds are, and how often each is drawn."""

    pictures: Tensor  # N 3 S S uint8
    masks: Tensor  # N 1 S S bool
    weights: Tensor  # N


def read_small(data: bytes, largest: int) -> Image:
    """An encoded picture, made smaller where a side is over `largest`, so that many fit into memory.

    Raises:
        DataError: it is broken.
    """
    picture = read_image(data)
    return to_square(picture, largest) if max(picture.size) > largest else picture


def to_pixels(pictures: Iterable[Image], side: int) -> Tensor:
    """Pictures within white squares of `side` pixels.  # -> N 3 S S uint8"""
    squares = [np.array(to_square(picture, side)) for picture in pictures]
    return torch.stack([torch.from_numpy(square).permute(2, 0, 1) for square in squares])


def make_bank(
    pictures: dict[str, list[Image]], side: int, shares: dict[str, float], device: torch.device
) -> Bank:
    """All pictures of all sources; a source without a share counts as many pictures as it has."""
    parts = [to_pixels(part, side) for part in pictures.values()]
    total = sum(len(part) for part in parts)
    weights = [
        torch.full((len(part),), shares[name] * total / len(part) if name in shares else 1.0)
        for name, part in zip(pictures, parts, strict=True)
    ]
    pixels = torch.cat(parts).to(device)
    return Bank(pixels, background_mask(pixels.float() / 255.0) > 0, torch.cat(weights).to(device))


class PictureLessons:
    """Draws training pictures on the device; says how far a reconstruction is from them."""

    def __init__(
        self, config: PictureLessonsConfig, pictures: dict[str, list[Image]], device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self.banks = {side: make_bank(pictures, side, config.shares, device) for side in config.sides}

    def draw(self, seed: int) -> Tensor:
        """A batch of one side, in [-1, 1]; the same for the same seed.  # -> B 3 S S"""
        dice = Dice(seed, self.device)
        config = self.config
        side = random.Random(seed).choices(list(config.sides), list(config.sides.values()))[0]
        num_drawn = round(config.drawn * config.batch)
        count = config.batch - num_drawn
        front, mask = self._moved(count, side, dice)
        others = self._moved(count, side, dice)[0]
        behind = torch.where(dice.chance(0.5, count, 1, 1, 1), others, backdrop(count, side, dice))
        composed = torch.lerp(front, behind, mask)
        front = torch.where(dice.chance(config.composed, count, 1, 1, 1), composed, front)
        front = recolour(front, config.recoloured, dice)
        return torch.cat([front, drawn_pictures(num_drawn, side, dice)]) * 2.0 - 1.0

    def _moved(self, count: int, side: int, dice: Dice) -> tuple[Tensor, Tensor]:
        """Known pictures and where their background is, moved alike.  # -> B 3 S S, B 1 S S"""
        bank = self.banks[side]
        chosen = torch.multinomial(bank.weights, count, replacement=True, generator=dice.generator)
        layers = torch.cat([bank.pictures[chosen].float() / 255.0, bank.masks[chosen].float()], 1)
        moved = warp(layers, self.config.warped, dice)
        return moved[:, :3], moved[:, 3:]

    def loss(self, target: Tensor, output: Tensor, settling: bool) -> Tensor:
        """L1, squares, edges and coarse L1 at first; while settling, the mean logarithm of the squared error.

        The PSNR of a set is the mean of -10·log10(mse) over its pictures, so the last phase descends on just that.
        """
        squares = (output - target).square().mean((1, 2, 3))  # B
        if settling:
            return (squares + ALMOST_EXACT).log().mean()
        loss = F.l1_loss(output, target) + 0.5 * squares.mean() + 0.5 * edge_difference(target, output)
        for factor in (2, 4):
            loss = loss + 0.25 * F.l1_loss(F.avg_pool2d(output, factor), F.avg_pool2d(target, factor))
        return loss


def edge_difference(target: Tensor, output: Tensor) -> Tensor:
    """L1 between the differences of neighbouring pixels, along both axes.  # B 3 S S, B 3 S S -> scalar"""
    error = output - target
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2.0


def psnr(target: Tensor, output: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture; both in [-1, 1].  # B 3 S S, B 3 S S -> B"""
    squares = ((output - target) / 2.0).square().mean((1, 2, 3))
    return -10.0 * squares.clamp(min=1e-10).log10()


def ssim(target: Tensor, output: Tensor) -> Tensor:
    """Structural similarity with an 11-pixel Gaussian window (Wang et al. 2004); in [-1, 1] -> [-1, 1].  # B"""
    line = torch.exp(-(torch.arange(11.0, device=target.device) - 5.0).square() / (2 * 1.5**2))
    kernel = torch.outer(line, line) / line.sum() ** 2

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None]).unflatten(0, x.shape[:2])[:, :, 0]

    first, second = (target + 1.0) / 2.0, (output + 1.0) / 2.0
    mean_1, mean_2 = blur(first), blur(second)
    variance_1, variance_2 = blur(first * first) - mean_1**2, blur(second * second) - mean_2**2
    shared = blur(first * second) - mean_1 * mean_2
    likeness = (2 * mean_1 * mean_2 + 1e-4) * (2 * shared + 9e-4)
    return (likeness / ((mean_1**2 + mean_2**2 + 1e-4) * (variance_1 + variance_2 + 9e-4))).mean((1, 2, 3))


@torch.no_grad()
def picture_scores(codec: Codec, pictures: Tensor) -> dict[str, float]:
    """PSNR, SSIM and used bits of pictures after a way through the codec.  # N 3 S S uint8"""
    device = next(codec.parameters()).device
    found: list[tuple[Tensor, Tensor]] = []
    cells = []
    for part in pictures.split(64):
        # Eight-bit pictures in, eight-bit pictures out, as a reader of the files would measure.
        target = part.to(device).float() / 127.5 - 1.0
        codes = codec.encode(target)
        output = ((codec.decode(codes) + 1.0) * 127.5).round() / 127.5 - 1.0
        found.append((psnr(target, output), ssim(target, output)))
        cells.append(codes.flatten(0, -2))
    decibels, likeness = (torch.cat(values) for values in zip(*found, strict=True))
    bits = code_bits(torch.cat(cells), codec)
    return {"psnr": decibels.mean().item(), "ssim": likeness.mean().item(), "bits": bits}
