"""Images for training a codec: kept, augmented and drawn on the device; the loss, and the scores."""

# Dimensions: B batch, N images, S side in pixels

import math
import random
from collections.abc import Iterable
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from pydantic import Field, model_validator
from torch import Tensor

from openm6.codecs.base import Codec, TrainableCodec, bits_per_code
from openm6.codecs.image import ImageCodecConfig
from openm6.data.source import Split
from openm6.modalities.image import read_image, to_square
from openm6.train.codec import CodecDataConfig, CodecRecipe, DeviceRng, draw_weights, hold_out, read_records

ALMOST_EXACT = 1e-3  # squared error (of a range of 2) below which an image no longer pulls: 36 dB
WHITE = 0.97  # channels above this count as background where they reach the border


class ImageDataConfig(CodecDataConfig):
    """How training images are drawn: batch size, sides in pixels with their weights, and how much is changed.

    `drawn` is the fraction made of random shapes; of the rest, `warped` are turned and resized (others only moved by
    whole pixels, or not at all if `still`), `composed` get another backdrop, `recoloured` other colours.
    """

    batch: int = Field(default=256, ge=2)
    sides: dict[int, float] = Field(default={64: 0.85, 32: 0.15}, min_length=1)
    drawn: float = Field(default=0.2, ge=0, lt=1)
    warped: float = Field(default=0.5, ge=0, le=1)
    still: float = Field(default=0.0, ge=0, le=1)
    composed: float = Field(default=0.35, ge=0, le=1)
    recoloured: float = Field(default=0.35, ge=0, le=1)


class ImageCodecRecipe(CodecRecipe):
    """What `openm6 train` reads if `kind` is `codec-image`."""

    kind: Literal["codec-image"] = "codec-image"
    codec: ImageCodecConfig = ImageCodecConfig()
    data: ImageDataConfig = ImageDataConfig()

    @model_validator(mode="after")
    def _sides_fit(self) -> Self:
        for side in self.data.sides:
            if side % self.codec.stride:
                raise ValueError(f"data.sides: {side} must be a multiple of {self.codec.stride}, the stride")
        return self


def read_small(data: bytes, largest: int) -> Image:
    """Decode an image, shrunk if a side is over `largest`, so that many fit into memory; DataError: it is broken."""
    image = read_image(data)
    return to_square(image, largest) if max(image.size) > largest else image


def to_pixels(images: Iterable[Image], side: int) -> Tensor:
    """Return images within white squares of `side` pixels.  # -> N 3 S S uint8"""
    squares = [np.array(to_square(image, side)) for image in images]
    return torch.stack([torch.from_numpy(square).permute(2, 0, 1) for square in squares])


class ImageSubject:
    """The subject of an image codec's training: the `image` field of its sources."""

    selected_by = ("psnr", 1)

    def __init__(self, recipe: ImageCodecRecipe, device: torch.device) -> None:
        self.recipe, self.config, self.device = recipe, recipe.data, device
        sides = self.config.sides
        self.side = max(sides, key=lambda side: sides[side])
        self.positions_per_batch = self.config.batch * (self.side // recipe.codec.stride) ** 2
        kept, held = hold_out(self._read("train"), recipe.held_out)
        self.images = {  # by side, N 3 S S uint8
            side: torch.cat([to_pixels(part, side) for part in kept.values()]).to(device) for side in sides
        }
        sizes = {name: [1.0] * len(part) for name, part in kept.items()}
        self.weights = draw_weights(sizes, self.config.source_weights).float().to(device)  # N
        self.held_out = to_pixels(held, self.side)

    def _read(self, split: Split) -> dict[str, list[Image]]:
        largest = max(self.config.sides)
        return read_records(self.recipe.sources, split, "image", lambda data: read_small(data, largest))

    def held_out_scores(self, codec: TrainableCodec) -> dict[str, float]:
        return image_scores(codec, self.held_out)

    def test_scores(self, codec: TrainableCodec) -> dict[str, dict[str, float]]:
        return {
            f"{name}_{side}": image_scores(codec, to_pixels(part, side))
            for name, part in self._read("test").items()
            for side in self.config.sides
        }

    def draw(self, seed: int) -> Tensor:
        """Return a batch of one side, in [-1, 1]; the same for the same seed.  # -> B 3 S S"""
        rng = DeviceRng(seed, self.device)
        config = self.config
        side = random.Random(seed).choices(list(config.sides), list(config.sides.values()))[0]
        num_drawn = round(config.drawn * config.batch)
        count = config.batch - num_drawn
        front, mask = self._moved(count, side, rng)
        others = self._moved(count, side, rng)[0]
        behind = torch.where(rng.bernoulli(0.5, count, 1, 1, 1), others, backdrop(count, side, rng))
        composed = torch.lerp(front, behind, mask)
        front = torch.where(rng.bernoulli(config.composed, count, 1, 1, 1), composed, front)
        front = recolour(front, config.recoloured, rng)
        return torch.cat([front, drawn_images(num_drawn, side, rng)]) * 2.0 - 1.0

    def _moved(self, count: int, side: int, rng: DeviceRng) -> tuple[Tensor, Tensor]:
        """Return images of the bank and their background masks, moved alike.  # -> B 3 S S, B 1 S S"""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=rng.generator)
        images = self.images[side][chosen].float() / 255.0
        layers = torch.cat([images, background_mask(images)], 1)
        moved = warp(layers, self.config.warped, rng)
        if self.config.still:
            moved = torch.where(rng.bernoulli(self.config.still, count, 1, 1, 1), layers, moved)
        return moved[:, :3], moved[:, 3:]

    def loss(self, target: Tensor, output: Tensor, settling: bool) -> Tensor:
        """Return L1, squares, edges and coarse L1 at first; while settling, the mean log of squares, as PSNR has it."""
        squares = (output - target).square().mean((1, 2, 3))  # B
        if settling:
            return (squares + ALMOST_EXACT).log().mean()
        loss = F.l1_loss(output, target) + 0.5 * squares.mean()
        error = output - target
        loss = loss + 0.25 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
        for factor in (2, 4):
            loss = loss + 0.25 * F.l1_loss(F.avg_pool2d(output, factor), F.avg_pool2d(target, factor))
        return loss


def psnr(target: Tensor, output: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image; both in [-1, 1].  # B 3 S S, B 3 S S -> B"""
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
def image_scores(codec: Codec, images: Tensor) -> dict[str, float]:
    """Return PSNR, SSIM and used bits of images that were encoded and decoded.  # N 3 S S uint8"""
    device = next(codec.parameters()).device
    found: list[tuple[Tensor, Tensor]] = []
    cells = []
    for part in images.split(64):
        # Eight-bit images in, eight-bit images out, as a reader of the files would measure.
        target = part.to(device).float() / 127.5 - 1.0
        codes = codec.encode(target)
        output = ((codec.decode(codes) + 1.0) * 127.5).round() / 127.5 - 1.0
        found.append((psnr(target, output), ssim(target, output)))
        cells.append(codes.flatten(0, -2))
    decibels, likeness = (torch.cat(values) for values in zip(*found, strict=True))
    bits = bits_per_code(torch.cat(cells), codec)
    return {"psnr": decibels.mean().item(), "ssim": likeness.mean().item(), "bits": bits}


def background_mask(images: Tensor) -> Tensor:
    """Return where white pixels are joined to the border: what another backdrop may replace.  # N 3 S S -> N 1 S S"""
    side = images.shape[-1]
    white = (images.amin(1, keepdim=True) >= WHITE).float()  # N 3 S S -> N 1 S S
    border = torch.zeros_like(white)
    border[..., 0, :] = border[..., -1, :] = border[..., 0] = border[..., -1] = 1.0
    reached = white * border
    for _ in range(2 * side):
        before, reached = reached, F.max_pool2d(reached, 3, 1, 1) * white
        if torch.equal(before, reached):
            break
    return reached


def warp(images: Tensor, warped: float, rng: DeviceRng) -> Tensor:
    """Move a fraction `warped` by any turn, size and shift, the rest by whole pixels, so that they stay sharp."""
    count, side = images.shape[0], images.shape[-1]
    angle = rng.uniform(count, low=-0.6, high=0.6)
    # Over 1 shrinks the image: it scales where pixels come from.
    size = torch.exp2(rng.uniform(count, low=-0.35, high=0.6))
    free = torch.stack([size * angle.cos(), -size * angle.sin(), size * angle.sin(), size * angle.cos()], 1)
    free_shift = rng.uniform(count, 2, low=-0.3, high=0.3)
    whole = torch.tensor([1.0, 0.0, 0.0, 1.0], device=rng.device).expand(count, 4)
    pixels = torch.randint(-side // 10, side // 10 + 1, (count, 2), generator=rng.generator, device=rng.device)
    whole_shift = pixels * (2.0 / side)
    is_free = rng.uniform(count, 1) < warped
    matrix = torch.where(is_free, free, whole).view(count, 2, 2)
    mirror = 1.0 - 2.0 * (rng.uniform(count, 2) < torch.tensor([0.5, 0.15], device=rng.device)).float()
    matrix = matrix * mirror[:, None, :]
    turned = rng.uniform(count, 1, 1) < 0.15
    matrix = torch.where(turned, matrix.flip(-1), matrix)  # swaps rows and columns
    theta = torch.cat([matrix, torch.where(is_free, free_shift, whole_shift)[:, :, None]], 2)
    grid = F.affine_grid(theta, [count, 1, side, side], align_corners=False)
    moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return moved.clamp(0.0, 1.0)


def recolour(images: Tensor, fraction: float, rng: DeviceRng) -> Tensor:
    """Mix or swap the colours of a fraction of the images, and change their contrast."""
    count = images.shape[0]
    order = rng.uniform(count, 3).argsort(1)
    swap = F.one_hot(order, 3).float()  # B 3 -> B 3 3
    mix = torch.eye(3, device=rng.device) + 0.25 * rng.normal(count, 3, 3)
    mix = mix / mix.sum(2, keepdim=True)  # rows of sum one leave grey as it is
    matrix = torch.where(rng.bernoulli(0.5, count, 1, 1, 1)[:, :, 0], swap, mix)
    changed = torch.einsum("bij,bjhw->bihw", matrix, images)
    contrast = rng.uniform(count, 1, 1, 1, low=0.5, high=1.2)
    level = rng.uniform(count, 3, 1, 1)
    changed = level + contrast * (changed - level)
    changed = torch.where(rng.bernoulli(0.1, count, 1, 1, 1), 1.0 - changed, changed)
    return torch.where(rng.bernoulli(fraction, count, 1, 1, 1), changed, images).clamp(0.0, 1.0)


def backdrop(count: int, side: int, rng: DeviceRng) -> Tensor:
    """Plain colours and two-colour slopes.  # -> B 3 S S"""
    x, y = _axes(side, rng)
    angle = rng.uniform(count, 1, 1, 1, high=2 * math.pi)
    slope = (0.5 + 0.5 * (x * angle.cos() + y * angle.sin())).clamp(0.0, 1.0)
    slope = slope * rng.bernoulli(0.6, count, 1, 1, 1)
    first, second = rng.uniform(count, 3, 1, 1), rng.uniform(count, 3, 1, 1)
    return torch.lerp(first, second, slope)


def drawn_images(count: int, side: int, rng: DeviceRng, num_shapes: int = 7) -> Tensor:
    """Backdrops with blobs, boxes, rings, stripes and strokes laid over them, edges one pixel soft.  # -> B 3 S S"""
    images = backdrop(count, side, rng)
    images = torch.where(rng.bernoulli(0.4, count, 1, 1, 1), torch.ones_like(images), images)
    for _ in range(num_shapes):
        cover = _shape(count, side, rng) * rng.bernoulli(0.8, count, 1, 1, 1)
        colour = torch.lerp(rng.uniform(count, 3, 1, 1), backdrop(count, side, rng), 0.5)
        black_or_white = rng.bernoulli(0.5, count, 1, 1, 1).float()
        colour = torch.where(rng.bernoulli(0.25, count, 1, 1, 1), black_or_white, colour)
        images = torch.lerp(images, colour.expand_as(images), cover)
    return images


def _shape(count: int, side: int, rng: DeviceRng) -> Tensor:
    """How much of each pixel one random shape covers.  # -> B 1 S S"""
    x, y = _axes(side, rng)
    angle = rng.uniform(count, 1, 1, 1, high=math.pi)
    shift_x, shift_y = (rng.uniform(count, 1, 1, 1, low=-0.9, high=0.9) for _ in range(2))
    half = torch.exp(rng.uniform(count, 2, 1, 1, low=-3.4, high=-0.2))
    across = (x - shift_x) * angle.cos() + (y - shift_y) * angle.sin()
    along = (y - shift_y) * angle.cos() - (x - shift_x) * angle.sin()
    bend = rng.uniform(count, 1, 1, 1, low=-1.5, high=1.5) * rng.bernoulli(0.5, count, 1, 1, 1)
    across = across + bend * along * along
    wide, tall = half[:, :1], half[:, 1:]
    oval = torch.sqrt((across / wide) ** 2 + (along / tall) ** 2 + 1e-6)
    oval_edge = (1.0 - oval) * torch.minimum(wide, tall)
    box_edge = torch.minimum(wide - across.abs(), tall - along.abs())
    edge = torch.where(rng.bernoulli(0.5, count, 1, 1, 1), oval_edge, box_edge)
    ring = rng.uniform(count, 1, 1, 1, low=0.02, high=0.12) - edge.abs()
    edge = torch.where(rng.bernoulli(0.25, count, 1, 1, 1), ring, edge)
    waves = torch.sin(across * rng.uniform(count, 1, 1, 1, low=8.0, high=40.0)) * 0.05
    edge = torch.where(rng.bernoulli(0.15, count, 1, 1, 1), torch.minimum(edge, waves), edge)
    return (0.5 + edge * side / 2.0).clamp(0.0, 1.0)


def _axes(side: int, rng: DeviceRng) -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels from -1 to 1.  # S, S 1"""
    line = (torch.arange(side, device=rng.device) + 0.5) * (2.0 / side) - 1.0
    return line[None, :], line[:, None]
