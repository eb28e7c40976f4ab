"""Memory that processes forked from this one see as well: weights that all train, gradients that they sum."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes of a cache line, which wide loads like to begin at


def shared_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A tensor of zeros for each of `tensors`, in memory that forked processes share.

    Anonymous, so no file of it can be left behind, and the size of /dev/shm (64 MB in many containers) does not matter.
    """
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += math.ceil(tensor.numel() * tensor.element_size() / ALIGNMENT) * ALIGNMENT
    memory = torch.frombuffer(mmap.mmap(-1, max(size, ALIGNMENT)), dtype=torch.uint8)
    return [
        memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, starts, strict=True)
    ]


@torch.no_grad()
def share_model(model: nn.Module) -> None:
    """Moves all parameters and buffers of a model on the CPU into shared memory; they stay the same objects."""
    # A set, as a weight used in two places must move once; `data` keeps what optimizers and modules refer to.
    tensors = list({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())
    for tensor, shared in zip(tensors, shared_like([tensor.data for tensor in tensors]), strict=True):
        shared.copy_(tensor.data)
        tensor.data = shared
