"""One product for many matrices: consecutive groups of rows, each times the matrix of its own expert."""

# Letters: R rows, D width in, F width out, E experts

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.base.errors import ConfigError

MOST_EXPERTS = 1023  # of one `F.grouped_mm` on a GPU


def grouped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The first counts[0] rows times weight[0], the next counts[1] times weight[1], and so on: R D -> R F.

    weight is E D F; counts is E, its sum is R. D and F must be multiples of 16 bytes. Under autocast the product
    runs in autocast's dtype, as `F.linear` would.
    """
    rows, weight = cast_alike(rows, weight)
    # On a GPU the kernel knows bf16 only; other dtypes occur there in tests, which may be slow.
    if rows.is_cuda and rows.dtype != torch.bfloat16:
        return grouped_product_reference(rows, weight, counts)
    ends = counts.cumsum(0).to(torch.int32)
    check_experts(len(weight), rows.device)
    if rows.is_cuda:
        weight = _IdleWithoutGradient.apply(weight, counts)
    return F.grouped_mm(rows, weight, offs=ends)


def grouped_product_reference(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The naive twin of `grouped_product`: a product for each expert."""
    parts = rows.split(counts.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, weight.unbind(), strict=True)])


def check_experts(count: int, device: torch.device) -> None:
    """Refuse more experts in one product than the kernel of a GPU takes.

    Raises:
        ConfigError: too many.
    """
    if device.type == "cuda" and count > MOST_EXPERTS:
        raise ConfigError(
            f"a layer has {count} experts on one GPU, whose grouped product takes {MOST_EXPERTS}: "
            f"lower experts.num_experts, or spread them over more ranks with parallel.experts"
        )


def idle(counts: Tensor) -> Tensor:
    """Which of E experts have no rows: E 1 1, for the gradient of their weights.

    There `F.grouped_mm` leaves what the memory held before, on compute capability 10.0 (pytorch issue 172439).
    """
    return (counts == 0)[:, None, None]


class _IdleWithoutGradient(torch.autograd.Function):
    """The weight as it is; its gradient is zero for experts without rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return gradient.masked_fill(idle(counts), 0.0), None


def cast_alike(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the weight's dtype, or under autocast in its own."""
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return rows.to(dtype), weight.to(dtype)
