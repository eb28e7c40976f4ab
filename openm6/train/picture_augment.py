"""Pictures changed and made up on the device: moved, recoloured, put before other backdrops, drawn from shapes."""

# Letters: B batch, N pictures, S side in pixels; pictures are in [0, 1] here

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.train.dice import Dice

WHITE = 0.97  # channels above this count as background where they reach the border


def background_mask(pictures: Tensor) -> Tensor:
    """Where white pixels are joined to the border: what may be replaced by another backdrop.  # N 3 S S -> N 1 S S"""
    side = pictures.shape[-1]
    white = (pictures.amin(1, keepdim=True) >= WHITE).float()  # N 3 S S -> N 1 S S
    border = torch.zeros_like(white)
    border[..., 0, :] = border[..., -1, :] = border[..., 0] = border[..., -1] = 1.0
    reached = white * border
    for _ in range(2 * side):
        reached = F.max_pool2d(reached, 3, 1, 1) * white
    return reached


def warp(pictures: Tensor, warped: float, dice: Dice) -> Tensor:
    """Moves each picture: a share by any turn, size and shift, the rest by whole pixels, so that they stay sharp."""
    count, side = pictures.shape[0], pictures.shape[-1]
    angle = dice.uniform(count, low=-0.6, high=0.6)
    # Over 1 shrinks the picture: it scales where pixels come from.
    size = torch.exp2(dice.uniform(count, low=-0.35, high=0.6))
    free = torch.stack([size * angle.cos(), -size * angle.sin(), size * angle.sin(), size * angle.cos()], 1)
    free_shift = dice.uniform(count, 2, low=-0.3, high=0.3)
    whole = torch.tensor([1.0, 0.0, 0.0, 1.0], device=dice.device).expand(count, 4)
    whole_shift = dice.integers(-side // 10, side // 10 + 1, count, 2) * (2.0 / side)
    is_free = dice.uniform(count, 1) < warped
    matrix = torch.where(is_free, free, whole).view(count, 2, 2)
    mirror = 1.0 - 2.0 * (dice.uniform(count, 2) < torch.tensor([0.5, 0.15], device=dice.device)).float()
    matrix = matrix * mirror[:, None, :]
    turned = dice.uniform(count, 1, 1) < 0.15
    matrix = torch.where(turned, matrix.flip(-1), matrix)  # swaps rows and columns
    theta = torch.cat([matrix, torch.where(is_free, free_shift, whole_shift)[:, :, None]], 2)
    grid = F.affine_grid(theta, [count, 1, side, side], align_corners=False)
    moved = F.grid_sample(pictures, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return moved.clamp(0.0, 1.0)


def recolour(pictures: Tensor, share: float, dice: Dice) -> Tensor:
    """Mixes or swaps the colours of a share of the pictures, and changes their contrast."""
    count = pictures.shape[0]
    order = dice.uniform(count, 3).argsort(1)
    swap = F.one_hot(order, 3).float()  # B 3 -> B 3 3
    mix = torch.eye(3, device=dice.device) + 0.25 * dice.normal(count, 3, 3)
    mix = mix / mix.sum(2, keepdim=True)  # rows of sum one leave grey as it is
    matrix = torch.where(dice.chance(0.5, count, 1, 1, 1)[:, :, 0], swap, mix)
    changed = torch.einsum("bij,bjhw->bihw", matrix, pictures)
    contrast = dice.uniform(count, 1, 1, 1, low=0.5, high=1.2)
    level = dice.uniform(count, 3, 1, 1)
    changed = level + contrast * (changed - level)
    changed = torch.where(dice.chance(0.1, count, 1, 1, 1), 1.0 - changed, changed)
    return torch.where(dice.chance(share, count, 1, 1, 1), changed, pictures).clamp(0.0, 1.0)


def backdrop(count: int, side: int, dice: Dice) -> Tensor:
    """Plain colours and two-colour slopes.  # -> B 3 S S"""
    x, y = _axes(side, dice)
    angle = dice.uniform(count, 1, 1, 1, high=2 * math.pi)
    slope = (0.5 + 0.5 * (x * angle.cos() + y * angle.sin())).clamp(0.0, 1.0)
    slope = slope * dice.chance(0.6, count, 1, 1, 1)
    first, second = dice.uniform(count, 3, 1, 1), dice.uniform(count, 3, 1, 1)
    return torch.lerp(first, second, slope)


def drawn_pictures(count: int, side: int, dice: Dice, num_shapes: int = 7) -> Tensor:
    """Backdrops with blobs, boxes, rings, stripes and strokes laid over them, edges one pixel soft.  # -> B 3 S S"""
    pictures = backdrop(count, side, dice)
    pictures = torch.where(dice.chance(0.4, count, 1, 1, 1), torch.ones_like(pictures), pictures)
    for _ in range(num_shapes):
        cover = _shape(count, side, dice) * dice.chance(0.8, count, 1, 1, 1)
        colour = torch.lerp(dice.uniform(count, 3, 1, 1), backdrop(count, side, dice), 0.5)
        black_or_white = dice.chance(0.5, count, 1, 1, 1).float()
        colour = torch.where(dice.chance(0.25, count, 1, 1, 1), black_or_white, colour)
        pictures = torch.lerp(pictures, colour.expand_as(pictures), cover)
    return pictures


def _shape(count: int, side: int, dice: Dice) -> Tensor:
    """How much of each pixel one random shape covers.  # -> B 1 S S"""
    x, y = _axes(side, dice)
    angle = dice.uniform(count, 1, 1, 1, high=math.pi)
    shift_x, shift_y = (dice.uniform(count, 1, 1, 1, low=-0.9, high=0.9) for _ in range(2))
    half = torch.exp(dice.uniform(count, 2, 1, 1, low=-3.4, high=-0.2))
    across = (x - shift_x) * angle.cos() + (y - shift_y) * angle.sin()
    along = (y - shift_y) * angle.cos() - (x - shift_x) * angle.sin()
    bend = dice.uniform(count, 1, 1, 1, low=-1.5, high=1.5) * dice.chance(0.5, count, 1, 1, 1)
    across = across + bend * along * along
    wide, tall = half[:, :1], half[:, 1:]
    oval = torch.sqrt((across / wide) ** 2 + (along / tall) ** 2 + 1e-6)
    oval_edge = (1.0 - oval) * torch.minimum(wide, tall)
    box_edge = torch.minimum(wide - across.abs(), tall - along.abs())
    edge = torch.where(dice.chance(0.5, count, 1, 1, 1), oval_edge, box_edge)
    ring = dice.uniform(count, 1, 1, 1, low=0.02, high=0.12) - edge.abs()
    edge = torch.where(dice.chance(0.25, count, 1, 1, 1), ring, edge)
    waves = torch.sin(across * dice.uniform(count, 1, 1, 1, low=8.0, high=40.0)) * 0.05
    edge = torch.where(dice.chance(0.15, count, 1, 1, 1), torch.minimum(edge, waves), edge)
    return (0.5 + edge * side / 2.0).clamp(0.0, 1.0)


def _axes(side: int, dice: Dice) -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels from -1 to 1.  # S, S 1"""
    line = (torch.arange(side, device=dice.device) + 0.5) * (2.0 / side) - 1.0
    return line[None, :], line[:, None]
