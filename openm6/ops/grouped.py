"""One product for many matrices: consecutive groups of rows, each times the matrix of its own expert."""

# Letters: R rows, D width in, F width out, E experts

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    return F.grouped_mm(rows, weight, offs=ends)


def grouped_product_reference(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The naive twin of `grouped_product`: a product for each expert."""
    parts = rows.split(counts.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, weight.unbind(), strict=True)])


def cast_alike(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the weight's dtype, or under autocast in its own."""
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return rows.to(dtype), weight.to(dtype)
