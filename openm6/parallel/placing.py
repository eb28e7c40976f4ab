"""Bringing a model to its device where some of it stands nowhere."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def place(module: AnyModule, device: torch.device) -> AnyModule:
    """`module.to(device)`, in place, that leaves tensors on `meta` where they are."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    return module
