"""How the blocks of a model run while it trains: compiled where that pays, recomputed where memory asks for it."""

from __future__ import annotations

import torch
from torch import nn

from openm6.base.log import get_log
from openm6.models.activations import layers_to_recompute
from openm6.models.backbone import Backbone
from openm6.models.running import CompiledBlocks, RecomputedBlocks, RunBlock, run_plainly
from openm6.train.config import LoopConfig


def choose_way(model: nn.Module, config: LoopConfig, tokens: int, pending: int, cut: bool = False) -> None:
    """Sets `run_block` of each backbone in the model that still runs plainly.

    tokens: of a step; pending: bytes that gradients and optimizer will take beside what is allocated now; cut: blocks
    gather their weights or exchange rows with other ranks, which no compiler sees through.
    """
    for backbone in (module for module in model.modules() if isinstance(module, Backbone)):
        if backbone.run_block is run_plainly:
            backbone.run_block = _way(backbone, config, tokens, pending, cut)


def _way(backbone: Backbone, config: LoopConfig, tokens: int, pending: int, cut: bool) -> RunBlock:
    device = backbone.final_norm.weight.device
    # On a processor compiling takes minutes and saves little: see docs/performance.md.
    compiles = device.type == "cuda" if config.compile == "auto" else config.compile
    run: RunBlock = CompiledBlocks() if compiles and not cut else run_plainly
    again = config.recompute
    if again == "auto":
        again = 0 if device.type != "cuda" else _by_memory(backbone, tokens, pending, device)
    if again:
        get_log().info(
            f"{again} of {backbone.config.num_layers} layers are computed again in the backward pass"
        )
        run = RecomputedBlocks(run, again)
    return run


def _by_memory(backbone: Backbone, tokens: int, pending: int, device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    half = torch.is_autocast_enabled("cuda") or backbone.final_norm.weight.dtype == torch.bfloat16
    return layers_to_recompute(backbone.config, tokens, 2 if half else 4, free - pending)
