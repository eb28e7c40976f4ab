"""Expert products with operands in eight bits: the kernel of a Hopper GPU, its plain twin, and a layer made of them.

For measuring alone: training has no option for it, see docs/performance.md.
"""

# Letters: R rows, K width that is summed over, N width out, E experts, B block of K

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.nn.exchange import ExpertExchange
from openm6.nn.experts import Experts, Router, RouterLoad
from openm6.nn.feedforward import activate
from openm6.ops.grouped import grouped_product_reference
from openm6.ops.routing import combine_rows, plan_dropless, send_rows

EIGHT_BITS = torch.float8_e4m3fn
LARGEST = torch.finfo(EIGHT_BITS).max


def on_hopper(device: torch.device) -> bool:
    """Whether torch's scaled grouped product with a scale for each row runs here: on compute capability 9.0 alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """… K -> the same in eight bits, and … scales that they are to be multiplied with, one for each row."""
    scale = (x.abs().amax(-1).float() / LARGEST).clamp(min=1e-12)
    return (x.float() / scale.unsqueeze(-1)).to(EIGHT_BITS), scale


@functools.cache
def compiled_quantise() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """`quantise` as one kernel, for a GPU."""
    return torch.compile(quantise)


def rounded(x: Tensor, block: int | None = None) -> Tensor:
    """What is left of x after eight bits with a scale for each row, or for each B numbers of one.  # … K -> … K"""
    parts = x if block is None else x.unflatten(-1, (-1, block))
    small, scale = quantise(parts)
    return (small.float() * scale.unsqueeze(-1)).to(x.dtype).view(x.shape)


def scaled_product(rows: Tensor, weight: Tensor, counts: Tensor, block: int | None = None) -> Tensor:
    """As `grouped_product`, both operands in eight bits: R K, E K N, E -> R N."""
    if block is None and on_hopper(rows.device):
        return _kernel(rows, weight, counts)
    return scaled_product_reference(rows, weight, counts, block)


def scaled_product_reference(
    rows: Tensor, weight: Tensor, counts: Tensor, block: int | None = None
) -> Tensor:
    """The naive twin: both operands rounded to eight bits, then multiplied as they are."""
    small = rounded(weight.mT.contiguous(), block).mT
    return grouped_product_reference(rounded(rows, block), small, counts)


def _kernel(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    fused = compiled_quantise()
    left, left_scale = fused(rows.contiguous())
    right, right_scale = fused(weight.mT.contiguous())  # E N K: the kernel wants K to lie together
    ends = counts.cumsum(0).to(torch.int32)
    product: Tensor = torch._scaled_grouped_mm(
        left, right.mT, left_scale, right_scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product


class _Product(torch.autograd.Function):
    """y = x·W and dx = dy·Wᵀ in eight bits; dW = xᵀ·dy as it is, since its sums are over few and uneven rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, counts)
        return scaled_product(rows, weight, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, counts = ctx.saved_tensors
        d_rows = scaled_product(gradient, weight.mT, counts)
        ends = counts.cumsum(0).to(torch.int32)
        d_weight = F.grouped_mm(rows.t(), gradient, offs=ends)  # R K, R N -> E K N
        return d_rows, d_weight, None


def eight_bit_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`scaled_product` with a gradient, for a layer that learns: R K, E K N, E -> R N."""
    product: Tensor = _Product.apply(rows, weight, counts)
    return product


class EightBitExperts(Experts):
    """A sparse layer whose two products run in eight bits, in one process and without a capacity."""

    def forward(
        self, x: Tensor, router: Router, valid: Tensor, exchange: ExpertExchange, layer: int
    ) -> tuple[Tensor, RouterLoad]:
        flat = x.flatten(0, 1)
        routing = router(flat, valid.flatten(), exchange)
        plan = plan_dropless(routing.chosen, self.config.num_experts)
        hidden = activate(eight_bit_product(send_rows(flat, plan), self.up, plan.counts), self.config.ffn)
        rows = eight_bit_product(hidden, self.down, plan.counts)
        return combine_rows(rows, routing.gate, plan).view_as(x), self._report(routing, plan, valid, layer)
