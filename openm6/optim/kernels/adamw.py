"""AdamW in one pass: each parameter, gradient and moment is read once and written once, whatever its dtype."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from openm6.optim.kernels.rounding import bits_at, mix, round_bf16

BLOCK_ELEMENTS = 2048


@triton.jit
def round_to(value, bits, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr) -> tl.tensor:
    """fp32 to DTYPE; if stochastic and bf16, by `round_bf16`."""
    if STOCHASTIC and DTYPE == tl.bfloat16:  # noqa: SIM108, SIM300 - the compiler chooses a branch
        rounded = round_bf16(value, bits)
    else:
        rounded = value.to(DTYPE)
    return rounded


@triton.jit
def adamw_values(p, g, m, v, numbers, beta1, beta2, epsilon) -> tl.tensor:
    """The rule in fp32; `numbers`: rate, rate · decay, 1/(1 − β1ᵗ), 1/sqrt(1 − β2ᵗ)."""
    rate, decay = tl.load(numbers), tl.load(numbers + 1)
    first_scale, second_scale = tl.load(numbers + 2), tl.load(numbers + 3)
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    p = p - decay * p
    p = p - rate * (m * first_scale) / (tl.sqrt(v) * second_scale + epsilon)
    return p, m, v


@triton.jit
def adamw_kernel(
    parameter,
    gradient,
    first,
    second,
    numbers,
    scale,
    seed,
    count,
    beta1,
    beta2,
    epsilon,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """One block of elements; a scale that is not a number leaves everything as it is."""
    factor = tl.load(scale)
    if factor == factor:
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offset < count
        p = tl.load(parameter + offset, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        g = tl.load(gradient + offset, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        m = tl.load(first + offset, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        v = tl.load(second + offset, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        p, m, v = adamw_values(p, g * factor, m, v, numbers, beta1, beta2, epsilon)
        key = mix(tl.load(seed).to(tl.uint32))
        bits = bits_at(offset, key)
        p_kept = round_to(p, bits, parameter.dtype.element_ty, STOCHASTIC)
        v_kept = round_to(v, bits >> 16, second.dtype.element_ty, STOCHASTIC)
        tl.store(parameter + offset, p_kept, mask=inside)
        tl.store(first + offset, m.to(first.dtype.element_ty), mask=inside)
        tl.store(second + offset, v_kept, mask=inside)


def adamw_pass(
    parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor,
    numbers: Tensor, scale: Tensor, seed: Tensor,
    betas: tuple[float, float], epsilon: float, stochastic: bool,
) -> None:  # fmt: skip
    """Updates parameter and moments in place; all four contiguous and of one shape.

    numbers: 4 in fp32, as `adamw_values` reads them; scale: 1, a factor on the gradient; seed: 1, int64. The three
    are on the device, so that nothing waits for them.
    """
    count = parameter.numel()
    adamw_kernel[(triton.cdiv(count, BLOCK_ELEMENTS),)](
        parameter, gradient, first, second, numbers, scale, seed, count, *betas, epsilon,
        BLOCK=BLOCK_ELEMENTS, STOCHASTIC=stochastic, num_warps=8,
    )  # fmt: skip
    increment_version((parameter, first, second))  # autograd does not see what a kernel writes
