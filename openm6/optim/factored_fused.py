"""The factored update in fused kernels where Triton and a GPU are there; the plain form in rules.py is its twin."""

# Letters: E matrices, R rows, C columns

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openm6 import kernels
from openm6.optim.blocks import LEVELS, SPARSE, STEPS, block_length
from openm6.optim.factored import TINY, follow_means, row_mean
from openm6.optim.pieces import WHOLE, Piece
from openm6.optim.rounding import matrix_keys


def available(gradient: Tensor, piece: Piece = WHOLE) -> bool:
    """Whether the kernels can run on this tensor.

    All ranks of a piece must answer alike, for the plain form exchanges its sums in other portions: where one of them
    has no rows, none takes the kernels.
    """
    if not gradient.numel() or (piece.group is not None and not all(piece.lengths)):
        return False
    return kernels.available(gradient.device)


def update_bf16(
    stored: dict[str, Tensor],
    gradient: Tensor,
    rate: float,
    decay: float,
    key: int,
    allowed: Tensor,
    piece: Piece = WHOLE,
) -> None:
    """Moves bf16 weights E R C; slots as in `FactoredRule`, all with the axis E."""
    numbers = _prepare(stored, gradient, rate, decay, key, allowed, piece)
    first_row = piece.rows(gradient.shape[1])[0]
    _triton().adafactor_update_bf16(stored["weight"], gradient, numbers, first_row)


def update_int8(
    stored: dict[str, Tensor],
    gradient: Tensor,
    rate: float,
    decay: float,
    key: int,
    allowed: Tensor,
    piece: Piece = WHOLE,
) -> None:
    """Moves int8 weights E R C and their exponents; slots as in `BlockRule`."""
    numbers = _prepare(stored, gradient, rate, decay, key, allowed, piece)
    blocks = block_length(gradient.shape[-1]), LEVELS, SPARSE, STEPS
    first_row = piece.rows(gradient.shape[1])[0]
    _triton().adafactor_update_int8(
        stored["weight"], stored["exponent"], gradient, numbers, blocks, first_row
    )


def _triton() -> Any:
    # Triton is optional.
    from openm6.kernels import optimizers  # noqa: PLC0415

    return optimizers


def _prepare(
    stored: dict[str, Tensor],
    gradient: Tensor,
    rate: float,
    decay: float,
    key: int,
    allowed: Tensor,
    piece: Piece,
) -> tuple[Tensor, ...]:
    """Follows the moments; gives allowed, inverse_row, inverse_column, rates, kept and keys for the last kernel."""
    triton = _triton()
    row, column = stored["row_var"], stored["col_var"]
    usable = allowed.to(torch.int32)
    row_sum, column_sum, largest = triton.adafactor_sums(gradient, usable)
    matrices, _, num_columns = gradient.shape
    _, num_rows = piece.rows(gradient.shape[1])  # of whole matrices
    active = largest > 0
    if piece.group is not None:
        both = piece.total(torch.cat([column_sum, active.float().unsqueeze(-1)], dim=-1))
        column_sum, active = both[:, :-1], both[:, -1] > 0
    means = (row_sum / num_columns + TINY, column_sum / num_rows + TINY)
    follow_means(*means, active, row, column, stored["count"])
    inverse_row = (row / row_mean(row, piece)).clamp(min=TINY).rsqrt()
    inverse_column = column.clamp(min=TINY).rsqrt()
    squares = piece.total(triton.adafactor_squares(gradient, usable, inverse_row, inverse_column))
    size = (squares / (num_rows * num_columns)).sqrt().clamp(min=1.0)
    rates = torch.where(active, rate / size, 0.0)
    kept = torch.where(active, 1 - rate * decay, 1.0)
    return (
        usable,
        inverse_row,
        inverse_column,
        rates,
        kept,
        matrix_keys(matrices, key, piece.first, gradient.device),
    )
