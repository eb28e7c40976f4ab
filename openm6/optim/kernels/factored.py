"""Triton kernels of the factored update: the gradient is read three times, nothing of its size is written besides."""

# Letters: E matrices, R rows, C columns, b weights of an int8 block; programs are (matrix, block of ROWS rows)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from openm6.optim.blocks import LEVELS, SPARSE, STEPS, block_length
from openm6.optim.kernels.rounding import bits_at, round_bf16

# Of the tile that one program holds: with more values a thread, registers spill where a width is no multiple of 16.
ROWS, COLUMNS, WARPS = 16, 256, 8
TILE = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS}


@triton.jit
def _tile(gradient, allowed, matrix, rows, columns, num_rows, num_columns):
    """Offsets, mask and values of one tile of the gradient; zeros where the gradient may not be used."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    offsets = (matrix * num_rows + rows)[:, None] * num_columns + columns[None, :]
    values = tl.load(gradient + offsets, mask=inside, other=0.0).to(tl.float32)
    usable = tl.load(allowed) != 0
    return offsets, inside, tl.where(usable, values, 0.0)


@triton.jit
def _random_bits(rows, columns, num_columns, key):
    """rounding.random_bits, for one tile."""
    return bits_at(rows[:, None] * num_columns + columns[None, :], key.to(tl.uint32, bitcast=True))


@triton.jit
def statistics(
    gradient, allowed, row_sum, row_largest, column_sums, num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Σ g² and max |g| of each row; Σ g² of each column over this program's rows (summed later, in a fixed order)."""
    matrix, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    total, largest = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, num_columns, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        _, _, values = _tile(gradient, allowed, matrix, rows, columns, num_rows, num_columns)
        square = values * values
        total += tl.sum(square, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(values), 1))
        place = column_sums + (matrix * tl.num_programs(1) + block) * num_columns + columns
        tl.store(place, tl.sum(square, 0), mask=columns < num_columns)
    tl.store(row_sum + matrix * num_rows + rows, total, mask=rows < num_rows)
    tl.store(row_largest + matrix * num_rows + rows, largest, mask=rows < num_rows)


@triton.jit
def _scaled(values, inverse_row, inverse_column, matrix, rows, columns, num_rows, num_columns):
    """The tile's update before its clip: g / √v."""
    by_row = tl.load(inverse_row + matrix * num_rows + rows, mask=rows < num_rows, other=0.0)
    by_column = tl.load(
        inverse_column + matrix * num_columns + columns, mask=columns < num_columns, other=0.0
    )
    return values * by_row[:, None] * by_column[None, :]


@triton.jit
def sizes(
    gradient, allowed, inverse_row, inverse_column, square_sums, num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Σ (g / √v)² over each program's rows."""
    matrix, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_columns, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        _, _, values = _tile(gradient, allowed, matrix, rows, columns, num_rows, num_columns)
        update = _scaled(values, inverse_row, inverse_column, matrix, rows, columns, num_rows, num_columns)
        total += tl.sum(update * update, 1)
    tl.store(square_sums + matrix * tl.num_programs(1) + block, tl.sum(total, 0))


@triton.jit
def apply_bf16(
    weight, gradient, allowed, inverse_row, inverse_column, rates, kept, keys, first_row, num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """weight · kept - rate · g / √v, rounded by chance."""
    matrix, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    offsets, inside, values = _tile(gradient, allowed, matrix, rows, columns, num_rows, num_columns)
    update = _scaled(values, inverse_row, inverse_column, matrix, rows, columns, num_rows, num_columns)
    old = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    new = old * tl.load(kept + matrix) - update * tl.load(rates + matrix)
    bits = _random_bits(first_row + rows, columns, num_columns, tl.load(keys + matrix))
    tl.store(weight + offsets, round_bf16(new, bits), mask=inside)


@triton.jit
def apply_int8(
    weight, exponent, gradient, allowed, inverse_row, inverse_column, rates, kept, keys, first_row, num_rows,
    num_columns,
    BLOCK: tl.constexpr, LEVELS: tl.constexpr, SPARSE: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """The same in units of each block's scale, which is moved where the block outgrows or underfills it."""
    matrix, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    offsets, inside, values = _tile(gradient, allowed, matrix, rows, columns, num_rows, num_columns)
    update = _scaled(values, inverse_row, inverse_column, matrix, rows, columns, num_rows, num_columns)
    groups = tl.program_id(2) * (COLUMNS // BLOCK) + tl.arange(0, COLUMNS // BLOCK)
    num_groups = num_columns // BLOCK
    places = (matrix * num_rows + rows)[:, None] * num_groups + groups[None, :]
    present = (rows < num_rows)[:, None] & (groups < num_groups)[None, :]
    power = tl.load(exponent + places, mask=present, other=0).to(tl.float32)  # rows, groups
    scale = tl.exp2(power / STEPS)[:, :, None]
    old = tl.load(weight + offsets, mask=inside, other=0).to(tl.float32)
    levels = tl.reshape(old * tl.load(kept + matrix), (ROWS, COLUMNS // BLOCK, BLOCK))
    levels -= tl.reshape(update * tl.load(rates + matrix), (ROWS, COLUMNS // BLOCK, BLOCK)) / scale
    largest = tl.max(tl.abs(levels), 2)
    growth = tl.ceil(STEPS * tl.log2(tl.maximum(largest, 1e-30) / (LEVELS - 1)))
    change = tl.where(largest > LEVELS - 1, growth, tl.where(largest < SPARSE, -STEPS, 0.0))
    change = tl.where(largest > 0, change, 0.0)
    raised = tl.minimum(tl.maximum(power + change, -127.0), 127.0)
    levels *= tl.exp2((power - raised) / STEPS)[:, :, None]
    tl.store(exponent + places, raised.to(tl.int8), mask=present)
    flat = tl.reshape(levels, (ROWS, COLUMNS))
    bits = _random_bits(first_row + rows, columns, num_columns, tl.load(keys + matrix))
    share = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08
    low = tl.floor(flat)
    rounded = low + (flat - low > share).to(tl.float32)
    rounded = tl.minimum(tl.maximum(rounded, -1.0 * LEVELS), 1.0 * LEVELS)
    tl.store(weight + offsets, rounded.to(tl.int8), mask=inside)


def gradient_sums(gradient: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ g² of rows E R and of columns E C, and max |g| E, of a gradient E R C."""
    matrices, num_rows, num_columns = gradient.shape
    blocks = triton.cdiv(num_rows, ROWS)
    row_sum, row_largest = (_empty(gradient, matrices, num_rows) for _ in range(2))
    column_sums = _empty(gradient, matrices, blocks, num_columns)
    statistics[(matrices, blocks)](
        gradient, allowed, row_sum, row_largest, column_sums, num_rows, num_columns, **TILE
    )  # fmt: skip
    return row_sum, column_sums.sum(1), row_largest.amax(-1)


def update_squares(gradient: Tensor, allowed: Tensor, inverse_row: Tensor, inverse_column: Tensor) -> Tensor:
    """Σ (g / √v)² of each matrix: E."""
    matrices, num_rows, num_columns = gradient.shape
    blocks = triton.cdiv(num_rows, ROWS)
    sums = _empty(gradient, matrices, blocks)
    sizes[(matrices, blocks)](
        gradient, allowed, inverse_row, inverse_column, sums, num_rows, num_columns, **TILE
    )  # fmt: skip
    return sums.sum(1)


def move_bf16(weight: Tensor, gradient: Tensor, numbers: tuple[Tensor, ...], first_row: int = 0) -> None:
    """`apply_bf16` on all tiles; numbers: allowed, inverse_row, inverse_column, rates, kept, keys.

    `first_row` is the place of the first row here within the whole matrix, which random bits follow.
    """
    apply_bf16[_grid(gradient)](
        weight, gradient, *numbers, first_row, *gradient.shape[1:], **TILE
    )  # fmt: skip
    increment_version(weight)  # autograd does not see what a kernel writes


def move_int8(
    weight: Tensor, exponent: Tensor, gradient: Tensor, numbers: tuple[Tensor, ...], first_row: int = 0
) -> None:
    """`apply_int8` on all tiles."""
    apply_int8[_grid(gradient)](
        weight, exponent, gradient, *numbers, first_row, *gradient.shape[1:],
        BLOCK=block_length(gradient.shape[-1]), LEVELS=LEVELS, SPARSE=SPARSE, STEPS=STEPS, **TILE,
    )  # fmt: skip
    increment_version((weight, exponent))


def _grid(gradient: Tensor) -> tuple[Any, ...]:
    matrices, num_rows, num_columns = gradient.shape
    return matrices, triton.cdiv(num_rows, ROWS), triton.cdiv(num_columns, COLUMNS)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
