"""Adafactor's second moment, kept as one number for each row and column of a matrix, for each expert by itself."""

# Letters: E matrices (experts; 1 for a plain matrix), R rows, C columns

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # added to squares, as in the paper


def active_matrices(gradient: Tensor) -> Tensor:
    """E bool: matrices that any token reached. An expert without tokens has a gradient of exactly 0."""
    return gradient.abs().amax((-2, -1)) > 0


def follow_moments(gradient: Tensor, row: Tensor, column: Tensor, count: Tensor) -> Tensor:
    """Takes the squares of a gradient E R C into its running means, in place, and returns which matrices were active.

    row: E R and column: E C, means of g² along the other axis; count: E, updates that the matrix has had. The decay
    is 1 - t^-0.8 (1804.04235, section 7.2). Where an expert got no token nothing decays: else its first gradient
    after a pause would be scaled up.
    """
    active = active_matrices(gradient)
    square = gradient.square() + TINY
    follow_means(square.mean(-1), square.mean(-2), active, row, column, count)
    return active


def follow_means(
    row_mean: Tensor, column_mean: Tensor, active: Tensor, row: Tensor, column: Tensor, count: Tensor
) -> None:
    """The same from the means of a gradient's squares."""
    count.add_(active)
    decay = torch.where(active, 1 - count.clamp(min=1).pow(-0.8), 1.0).unsqueeze(-1)
    row.lerp_(row_mean, 1 - decay)
    column.lerp_(column_mean, 1 - decay)


def scaled_update(gradient: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """g / √v with v[r, c] = row[r] · column[c] / mean(row), then clipped to a root mean square of 1 for each matrix.

    (1804.04235, algorithm 4 and section 6.) This clip takes the place of one by the norm of all gradients, which
    nobody knows while gradients are used up layer by layer.
    """
    inverse_row = (row / row.mean(-1, keepdim=True).clamp(min=TINY)).clamp(min=TINY).rsqrt()
    update = gradient * inverse_row.unsqueeze(-1) * column.clamp(min=TINY).rsqrt().unsqueeze(-2)
    size = update.square().mean((-2, -1), keepdim=True).sqrt()
    return update / size.clamp(min=1.0)
