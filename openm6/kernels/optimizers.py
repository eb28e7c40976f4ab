"""Triton kernels of the optimizers: stochastic rounding, AdamW in one pass, Adafactor in three, weights in int8.

AdamW reads and writes each parameter, gradient and moment once, whatever its dtype. Adafactor reads the gradient three
times (with a momentum, that twice) and writes nothing else of its size. `openm6.optim` has the references.
"""

# Shapes: E matrices, R rows, C columns, b weights of an int8 block; Adafactor's programs are (matrix, ROWS rows)

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

BLOCK_ELEMENTS = 2048  # of AdamW
DEQUANTIZED = 4096  # weights of one program
# Adafactor's tile of one program: with more values per thread, registers spill if a width is no multiple of 16.
ROWS, COLUMNS, WARPS = 16, 256, 16
TILE = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS}


@triton.jit
def mix(x) -> tl.tensor:
    """A permutation of 32-bit numbers without visible order ("lowbias32"), as `ops.random_bits.mix_32`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def bits_at(position, key) -> tl.tensor:
    """`low_precision.random_bits` for these positions in a matrix (any integer type) and its key (uint32)."""
    return mix(position.to(tl.uint32) * 0x9E3779B9 + key)


@triton.jit
def round_bf16(value, bits) -> tl.tensor:
    """`low_precision.round_to_bf16`: stochastic rounding of fp32 to bf16; finite stays finite."""
    # bf16 is the upper half of fp32: 16 random bits added below it carry into it with the right probability.
    raised = (value.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
    largest = 3.3895313892515355e38
    rounded = tl.minimum(tl.maximum(raised.to(tl.float32, bitcast=True), -largest), largest)
    finite = tl.abs(value) < float("inf")  # False for NaN, too: bits added to one may make it a number
    return tl.where(finite, rounded, value).to(tl.bfloat16)


@triton.jit
def round_to(value, bits, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr) -> tl.tensor:
    """fp32 to DTYPE; if stochastic and bf16, by `round_bf16`."""
    if STOCHASTIC and DTYPE == tl.bfloat16:  # noqa: SIM108, SIM300 - the compiler chooses a branch
        rounded = round_bf16(value, bits)
    else:
        rounded = value.to(DTYPE)
    return rounded


@triton.jit
def adamw_kernel(
    table, numbers, num_tensors, beta1, beta2, epsilon,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    TENSORS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr,
) -> None:  # fmt: skip
    """One block of elements of one tensor, in fp32.

    table: 7 T, four addresses, element counts, first blocks (ascending), seeds; numbers: T 4, rate, rate · decay,
    1/(1 − β1ᵗ), 1/sqrt(1 − β2ᵗ). If the rate is NaN, nothing is written.
    """
    index = tl.arange(0, TENSORS)
    starts = tl.load(table + 5 * num_tensors + index, mask=index < num_tensors, other=2**62)
    # The last tensor that begins at this block or before; the ones before it with the same start are empty.
    tensor = tl.sum((starts <= tl.program_id(0)).to(tl.int32), 0) - 1
    parameter = tl.load(table + tensor).to(tl.pointer_type(PARAMETER))
    gradient = tl.load(table + num_tensors + tensor).to(tl.pointer_type(GRADIENT))
    first = tl.load(table + 2 * num_tensors + tensor).to(tl.pointer_type(FIRST))
    second = tl.load(table + 3 * num_tensors + tensor).to(tl.pointer_type(SECOND))
    parameter, gradient = tl.multiple_of(parameter, ALIGNMENT), tl.multiple_of(gradient, ALIGNMENT)
    first, second = tl.multiple_of(first, ALIGNMENT), tl.multiple_of(second, ALIGNMENT)
    count = tl.multiple_of(tl.load(table + 4 * num_tensors + tensor), ALIGNMENT)
    start = tl.load(table + 5 * num_tensors + tensor)
    seed = tl.load(table + 6 * num_tensors + tensor).to(tl.uint32)
    rate, decay = tl.load(numbers + 4 * tensor), tl.load(numbers + 4 * tensor + 1)
    first_scale, second_scale = tl.load(numbers + 4 * tensor + 2), tl.load(numbers + 4 * tensor + 3)
    offset = (tl.program_id(0) - start) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < tl.multiple_of(tl.where(rate == rate, count, 0), ALIGNMENT)
    p = tl.load(parameter + offset, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    g = tl.load(gradient + offset, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    m = tl.load(first + offset, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    v = tl.load(second + offset, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    p = p - decay * p
    p = p - rate * (m * first_scale) / (tl.sqrt(v) * second_scale + epsilon)
    bits = bits_at(offset, mix(seed))
    tl.store(parameter + offset, round_to(p, bits, PARAMETER, STOCHASTIC), mask=inside)
    tl.store(first + offset, m.to(FIRST), mask=inside)
    tl.store(second + offset, round_to(v, bits >> 16, SECOND, STOCHASTIC), mask=inside)


def adamw_update(
    tensors: Sequence[tuple[Tensor, ...]], numbers: Sequence[tuple[float, ...]], seeds: Sequence[int],
    betas: tuple[float, float], epsilon: float, stochastic: bool, aligned: int, skip: Tensor | None = None,
) -> None:  # fmt: skip
    """Update parameters and moments in place, all in one launch; nothing waits, and nothing changes if `skip` is NaN.

    tensors: T times parameter, gradient, first and second moment, contiguous, on one device, and of the same four
    dtypes and `alignment` for each parameter; numbers: T times the four that `adamw_kernel` reads.
    """
    counts = [parameter.numel() for parameter, *_ in tensors]
    blocks = list(itertools.accumulate((triton.cdiv(count, BLOCK_ELEMENTS) for count in counts), initial=0))
    if not blocks[-1]:
        return
    addresses = [[row[kind].data_ptr() for row in tensors] for kind in range(4)]
    device = tensors[0][0].device
    # Gradients are in other places in every step, so the table is sent each time: some kilobytes.
    table = torch.tensor([*addresses, counts, blocks[:-1], list(seeds)]).to(device, non_blocking=True)
    scalars = torch.tensor(numbers).to(device, non_blocking=True)
    with torch.cuda.device_of(table):
        adamw_kernel[(blocks[-1],)](
            table, scalars if skip is None else scalars + skip, len(tensors), *betas, epsilon,
            *(getattr(tl, str(one.dtype).removeprefix("torch.")) for one in tensors[0]),
            TENSORS=triton.next_power_of_2(len(tensors)), ALIGNMENT=aligned, BLOCK=BLOCK_ELEMENTS,
            STOCHASTIC=stochastic, num_warps=8,
        )  # fmt: skip
    # Autograd does not see what a kernel writes.
    increment_version([one for parameter, _, *moments in tensors for one in (parameter, *moments)])


def alignment(tensors: Iterable[Tensor]) -> int:
    """Return 16 if a kernel may read 16 bytes at a time from these tensors up to their ends, else 1."""
    return 1 if any(tensor.data_ptr() % 16 or tensor.numel() % 16 for tensor in tensors) else 16


@triton.jit
def _tile(gradient, allowed, matrix, rows, columns, num_rows, num_columns):
    """Offsets, mask and values of one tile of the gradient; zeros where the gradient may not be used."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    offsets = (matrix * num_rows + rows)[:, None] * num_columns + columns[None, :]
    values = tl.load(gradient + offsets, mask=inside, other=0.0).to(tl.float32)
    usable = tl.load(allowed) != 0
    return offsets, inside, tl.where(usable, values, 0.0)


@triton.jit
def _direction(
    gradient, allowed, momentum, weights, matrix, rows, columns, num_rows, num_columns
):  # fmt: skip
    """`_tile` of the gradient or, with a momentum, of its running mean, in which the gradient has `weights`."""
    offsets, inside, values = _tile(gradient, allowed, matrix, rows, columns, num_rows, num_columns)
    if momentum is not None:
        mean = tl.load(momentum + offsets, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + matrix)
        # As `torch.lerp`, which is exact at both ends.
        change = values - mean
        values = tl.where(weight < 0.5, mean + weight * change, values - change * (1 - weight))
    return offsets, inside, values


@triton.jit
def _random_bits(rows, columns, num_columns, key):
    """`low_precision.random_bits`, for one tile."""
    return bits_at(rows[:, None] * num_columns + columns[None, :], key.to(tl.uint32, bitcast=True))


@triton.jit
def sums_kernel(
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
        target = column_sums + (matrix * tl.num_programs(1) + block) * num_columns + columns
        tl.store(target, tl.sum(square, 0), mask=columns < num_columns)
    tl.store(row_sum + matrix * num_rows + rows, total, mask=rows < num_rows)
    tl.store(row_largest + matrix * num_rows + rows, largest, mask=rows < num_rows)


@triton.jit
def _scaled(values, inverse_row, inverse_column, matrix, rows, columns, num_rows, num_columns):
    """The tile's update before its clip: g / √v."""
    by_row = tl.load(inverse_row + matrix * num_rows + rows, mask=rows < num_rows, other=0.0)
    by_column = tl.load(inverse_column + matrix * num_columns + columns, mask=columns < num_columns, other=0.0)
    return values * by_row[:, None] * by_column[None, :]


@triton.jit
def squares_kernel(
    gradient, allowed, momentum, weights, inverse_row, inverse_column, square_sums, num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Σ (direction / √v)² over each program's rows."""
    matrix, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_columns, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        _, _, values = _direction(
            gradient, allowed, momentum, weights, matrix, rows, columns, num_rows, num_columns
        )  # fmt: skip
        update = _scaled(values, inverse_row, inverse_column, matrix, rows, columns, num_rows, num_columns)
        total += tl.sum(update * update, 1)
    tl.store(square_sums + matrix * tl.num_programs(1) + block, tl.sum(total, 0))


@triton.jit
def adafactor_bf16_kernel(
    weight, momentum, weights, momentum_keys, gradient, allowed, inverse_row, inverse_column, rates, decay, keys,
    first_row, num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """weight · decay - rate · direction / √v, and the momentum if there is one, with stochastic rounding."""
    matrix, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    offsets, inside, values = _direction(
        gradient, allowed, momentum, weights, matrix, rows, columns, num_rows, num_columns
    )  # fmt: skip
    update = _scaled(values, inverse_row, inverse_column, matrix, rows, columns, num_rows, num_columns)
    if momentum is not None:
        noise = _random_bits(first_row + rows, columns, num_columns, tl.load(momentum_keys + matrix))
        tl.store(momentum + offsets, round_bf16(values, noise), mask=inside)
    old = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    new = old * tl.load(decay + matrix) - update * tl.load(rates + matrix)
    bits = _random_bits(first_row + rows, columns, num_columns, tl.load(keys + matrix))
    tl.store(weight + offsets, round_bf16(new, bits), mask=inside)


@triton.jit
def power_of_2(exponent, STEPS: tl.constexpr) -> tl.tensor:
    """2^(exponent / STEPS), correctly rounded: a device's own exp2 is not, so weights would depend on the device."""
    tl.static_assert(STEPS == 4)
    step, whole = exponent & 3, (exponent >> 2) + 127  # the exponent field of fp32
    odd = tl.where(step == 1, 1.189207115002721, 1.681792830507429)
    even = tl.where(step == 0, 1.0, 1.4142135623730951)
    return tl.where((step & 1) == 1, odd, even) * (whole << 23).to(tl.float32, bitcast=True)


@triton.jit
def adafactor_int8_kernel(
    weight, exponent, gradient, allowed, inverse_row, inverse_column, rates, decay, keys, first_row, num_rows,
    num_columns,
    BLOCK: tl.constexpr, LEVELS: tl.constexpr, SPARSE: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """The same in units of each block's scale, which changes when the block outgrows or underfills it."""
    matrix, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    offsets, inside, values = _tile(gradient, allowed, matrix, rows, columns, num_rows, num_columns)
    update = _scaled(values, inverse_row, inverse_column, matrix, rows, columns, num_rows, num_columns)
    groups = tl.program_id(2) * (COLUMNS // BLOCK) + tl.arange(0, COLUMNS // BLOCK)
    num_groups = num_columns // BLOCK
    positions = (matrix * num_rows + rows)[:, None] * num_groups + groups[None, :]
    present = (rows < num_rows)[:, None] & (groups < num_groups)[None, :]
    power = tl.load(exponent + positions, mask=present, other=0).to(tl.int32)  # rows, groups
    scale = power_of_2(power, STEPS)[:, :, None]
    old = tl.load(weight + offsets, mask=inside, other=0).to(tl.float32)
    levels = tl.reshape(old * tl.load(decay + matrix), (ROWS, COLUMNS // BLOCK, BLOCK))
    levels -= tl.reshape(update * tl.load(rates + matrix), (ROWS, COLUMNS // BLOCK, BLOCK)) / scale
    largest = tl.max(tl.abs(levels), 2)
    growth = tl.ceil(STEPS * tl.log2(tl.maximum(largest, 1e-30) / (LEVELS - 1)))
    change = tl.where(largest > LEVELS - 1, growth, tl.where(largest < SPARSE, -STEPS, 0.0))
    change = tl.where(largest > 0, change, 0.0)
    raised = tl.minimum(tl.maximum(power + change.to(tl.int32), -127), 127)
    levels *= power_of_2(power - raised, STEPS)[:, :, None]
    tl.store(exponent + positions, raised.to(tl.int8), mask=present)
    flat = tl.reshape(levels, (ROWS, COLUMNS))
    bits = _random_bits(first_row + rows, columns, num_columns, tl.load(keys + matrix))
    threshold = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08
    low = tl.floor(flat)
    rounded = low + (flat - low > threshold).to(tl.float32)
    rounded = tl.minimum(tl.maximum(rounded, -1.0 * LEVELS), 1.0 * LEVELS)
    tl.store(weight + offsets, rounded.to(tl.int8), mask=inside)


def adafactor_sums(gradient: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ g² of rows E R and of columns E C, and max |g| E, of a gradient E R C."""
    matrices, num_rows, num_columns = gradient.shape
    blocks = triton.cdiv(num_rows, ROWS)
    row_sum, row_largest = (_empty(gradient, matrices, num_rows) for _ in range(2))
    column_sums = _empty(gradient, matrices, blocks, num_columns)
    with torch.cuda.device_of(gradient):
        sums_kernel[(matrices, blocks)](
            gradient, allowed, row_sum, row_largest, column_sums, num_rows, num_columns, **TILE
        )
    return row_sum, column_sums.sum(1), row_largest.amax(-1)


@dataclass(frozen=True)
class Momentum:
    """A running mean of the gradient E R C in bf16, and for each matrix the gradient's weight in it and a key."""

    values: Tensor
    weights: Tensor
    keys: Tensor


def adafactor_squares(
    gradient: Tensor, allowed: Tensor, inverse_row: Tensor, inverse_column: Tensor, momentum: Momentum | None = None
) -> Tensor:
    """Return Σ (direction / √v)² of each matrix: E; the direction is the gradient or, with a momentum, the new mean."""
    matrices, num_rows, num_columns = gradient.shape
    blocks = triton.cdiv(num_rows, ROWS)
    sums = _empty(gradient, matrices, blocks)
    mean = (None, None) if momentum is None else (momentum.values, momentum.weights)
    with torch.cuda.device_of(gradient):
        squares_kernel[(matrices, blocks)](
            gradient, allowed, *mean, inverse_row, inverse_column, sums, num_rows, num_columns, **TILE
        )  # fmt: skip
    return sums.sum(1)


def adafactor_update(
    weight: Tensor, exponent: Tensor | None, gradient: Tensor, numbers: tuple[Tensor, ...],
    blocks: tuple[int, int, int, int], first_row: int = 0, momentum: Momentum | None = None,
) -> None:  # fmt: skip
    """Update bf16 weights (and their momentum), or int8 weights with their exponents, in place.

    numbers: allowed, inverse_row, inverse_column, rates, decay, keys; blocks: length, LEVELS, SPARSE, STEPS of
    `optim.low_precision`; first_row: the index of the first row here within the whole matrix, for the random bits.
    """
    matrices, num_rows, num_columns = gradient.shape
    grid = (matrices, triton.cdiv(num_rows, ROWS), triton.cdiv(num_columns, COLUMNS))
    sizes = (first_row, num_rows, num_columns)
    if exponent is None:
        mean = (None,) * 3 if momentum is None else (momentum.values, momentum.weights, momentum.keys)
        with torch.cuda.device_of(weight):
            adafactor_bf16_kernel[grid](weight, *mean, gradient, *numbers, *sizes, **TILE)
        if momentum is not None:
            increment_version(momentum.values)
    else:
        with torch.cuda.device_of(weight):
            adafactor_int8_kernel[grid](weight, exponent, gradient, *numbers, *sizes, *blocks, **TILE)
        increment_version(exponent)
    increment_version(weight)  # autograd does not see what a kernel writes


@triton.jit
def dequantize_kernel(
    levels, exponent, weight, num_blocks, STEPS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr
) -> None:  # fmt: skip
    """weight = level · 2^(exponent / STEPS) of its block, for GROUPS blocks of BLOCK weights"""
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = groups < num_blocks
    scale = power_of_2(tl.load(exponent + groups, mask=inside, other=0).to(tl.int32), STEPS)
    offsets = groups[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(levels + offsets, mask=inside[:, None], other=0).to(tl.float32) * scale[:, None]
    tl.store(weight + offsets, value.to(weight.dtype.element_ty), mask=inside[:, None])


def dequantize(levels: Tensor, exponent: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """Return `low_precision.from_levels`, to the bit: some 3 bytes are read and written per bf16 weight."""
    weight = torch.empty(levels.shape, dtype=dtype, device=levels.device)
    if not levels.numel():
        return weight
    num_blocks, block = exponent.numel(), levels.numel() // exponent.numel()
    groups = DEQUANTIZED // block
    with torch.cuda.device_of(levels):
        dequantize_kernel[(triton.cdiv(num_blocks, groups),)](
            levels.contiguous(), exponent.contiguous(), weight, num_blocks, STEPS=steps, BLOCK=block, GROUPS=groups
        )  # fmt: skip
    return weight


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
