"""Gradients of weights that several ranks hold alike, summed in a few large buckets.

`DistributedDataParallel` waits for a gradient of every parameter on every rank. Here a rank whose rows hold no
picture has no gradient for the picture adapter: it must take part all the same, and a parameter that no rank used
must stay without a gradient, as in one process, so that the optimizer leaves it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 25 * 2**20


def sum_gradients(parameters: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sums the gradients of `parameters`, which are the same on all ranks of `group`, in place."""
    if not parameters:
        return
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    chosen = [parameter for parameter, flag in zip(parameters, used.tolist(), strict=True) if flag]
    for parameter in chosen:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in chosen if parameter.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(pieces, bucket, strict=True)])


def forget_unused(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Takes away gradients whose parts, which the ranks of `group` hold, are zero on all of them."""
    parts = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    used = torch.stack([part.any() for part in parts]).to(torch.uint8)
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    found = iter(used.tolist())
    for parameter in parameters:
        if parameter.grad is not None and not next(found):
            parameter.grad = None


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(parameters: Sequence[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """The norm of all gradients, of which the ranks of `group` hold disjoint parts; None: this rank holds all."""
    parts = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(parts)
    if group is None:
        return norm
    device = local(parameters[0]).device
    square = norm.to(device, torch.float32).square()
    dist.all_reduce(square, group=group)
    return square.sqrt()


def clip(parameters: Sequence[Tensor], bound: float, norm: Tensor) -> None:
    """Scales gradients so that their norm, known to be `norm`, becomes `bound` at most."""
    parts = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if parts:
        torch._foreach_mul_(parts, (bound / (norm + 1e-6)).clamp(max=1.0))


def apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups in which plain parameters and parts of distributed ones do not mix: fused updates refuse that."""
    return [
        {**group, "params": chosen}
        for group in groups
        for kind in (False, True)
        if (chosen := [p for p in group["params"] if isinstance(p, DTensor) is kind])
    ]


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype together, up to the size of a bucket."""
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        if not buckets or size > room or buckets[-1][0].dtype != gradient.dtype:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(gradient)
        room -= size
    return buckets
