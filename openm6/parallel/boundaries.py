"""The inputs of groups of layers, kept from the forward pass to the backward one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


class Boundary:
    """A tensor where it is."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.detach()

    def take(self) -> Tensor:
        """The tensor on its device, for the last time."""
        return self._x


class HostBoundary(Boundary):
    """A GPU's tensor that waits in pinned host memory.

    Both copies go through the current stream: the way out is paid by the forward pass, which has time while weights
    arrive, and the tensor's memory on the GPU is free for the next layer at once.
    """

    def __init__(self, x: Tensor) -> None:
        self._device = x.device
        self._x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._x.copy_(x.detach(), non_blocking=True)

    def take(self) -> Tensor:
        return self._x.to(self._device, non_blocking=True)


def keep_boundary(x: Tensor, where: Literal["device", "host"]) -> Boundary:
    """Keeps `x` on the device, or in the host's memory where the device is a GPU."""
    return HostBoundary(x) if where == "host" and x.is_cuda else Boundary(x)
