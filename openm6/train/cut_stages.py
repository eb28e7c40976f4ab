"""From the pseudo stage to the real one where the model is cut over ranks."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from openm6.models.omni import Omni
from openm6.parallel.recut import Recut, gather_parameters
from openm6.parallel.sharding import Layout, shard_rest


@torch.no_grad()
def delink_cut(omni: Omni, layout: Layout) -> tuple[Omni, dict[str, str]]:
    """The model with weights of its own for each layer, cut as it was, and new parameter name -> old one.

    The answers are those of before. Never more than one block stands whole on a rank, and of its experts only those
    that the rank holds. The old model must not be used any more.
    """
    names = omni.delink(Recut(layout).refill)
    gather_parameters(cast(list[nn.Module], [omni.adapters, omni.backbone.layers, omni.backbone.final_norm]))
    fresh = omni.unwrapped()
    shard_rest(fresh, layout)
    return fresh, names
