"""Adafactor's second moment, kept as one number for each row and column of a matrix, for each expert by itself."""

# Letters: E matrices (experts; 1 for a plain matrix), R rows, C columns

from __future__ import annotations

import torch
from torch import Tensor

from openm6.optim.pieces import WHOLE, Piece

TINY = 1e-30  # added to squares, as in the paper


def follow_moments(
    gradient: Tensor, row: Tensor, column: Tensor, count: Tensor, piece: Piece = WHOLE
) -> Tensor:
    """Takes the squares of a gradient E R C into its running means, in place, and returns which matrices were active.

    row: E R and column: E C, means of g² along the other axis; count: E, updates that the matrix has had. The decay
    is 1 - t^-0.8 (1804.04235, section 7.2). Where an expert got no token, and has a gradient of exactly 0, nothing
    decays: else its first gradient after a pause would be scaled up. `piece` says which rows lie here.
    """
    square = gradient.square() + TINY
    sums = square.sum(-2)  # E C
    active = (gradient != 0).flatten(1).any(-1)  # E
    if piece.group is not None:
        both = piece.total(torch.cat([sums, active.to(sums.dtype).unsqueeze(-1)], dim=-1))
        sums, active = both[:, :-1], both[:, -1] > 0
    _, num_rows = piece.rows(gradient.shape[-2])
    follow_means(square.mean(-1), sums / num_rows, active, row, column, count)
    return active


def follow_means(
    row_mean: Tensor, column_mean: Tensor, active: Tensor, row: Tensor, column: Tensor, count: Tensor
) -> None:
    """The same from the means of a gradient's squares."""
    count.add_(active)
    decay = torch.where(active, 1 - count.clamp(min=1).pow(-0.8), 1.0).unsqueeze(-1)
    row.lerp_(row_mean, 1 - decay)
    column.lerp_(column_mean, 1 - decay)


def row_mean(row: Tensor, piece: Piece = WHOLE) -> Tensor:
    """The mean of the row means of whole matrices, at least TINY: E R -> E 1."""
    _, num_rows = piece.rows(row.shape[-1])
    return (piece.total(row.sum(-1, keepdim=True)) / num_rows).clamp(min=TINY)


def scaled_update(gradient: Tensor, row: Tensor, column: Tensor, piece: Piece = WHOLE) -> Tensor:
    """g / √v with v[r, c] = row[r] · column[c] / mean(row), then clipped to a root mean square of 1 for each matrix.

    (1804.04235, algorithm 4 and section 6.) This clip takes the place of one by the norm of all gradients, which
    nobody knows while gradients are used up layer by layer.
    """
    inverse_row = (row / row_mean(row, piece)).clamp(min=TINY).rsqrt()
    update = gradient * inverse_row.unsqueeze(-1) * column.clamp(min=TINY).rsqrt().unsqueeze(-2)
    count = piece.rows(gradient.shape[-2])[1] * gradient.shape[-1]
    size = (piece.total(update.square().sum((-2, -1), keepdim=True)) / count).sqrt()
    return update / size.clamp(min=1.0)
