"""The list of optimizers and their parameter groups; adding one is one entry."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from openm6.optim.adafactor import Adafactor
from openm6.optim.adamw import AdamW
from openm6.optim.config import OptimizerConfig
from openm6.optim.muon import Muon
from openm6.optim.sharding import ShardSpecOf, replicated

Groups = list[dict[str, Any]]
Build = Callable[[Groups, OptimizerConfig, ShardSpecOf], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "adamw": lambda groups, config, spec_of: AdamW(
        groups, config.learning_rate, config.betas, config.epsilon, config.weight_decay,
        torch.bfloat16 if config.moments == "bf16" else None, config.rounding == "stochastic", spec_of,
    ),
    "adafactor": lambda groups, config, spec_of: Adafactor(groups, config.learning_rate, config.weight_decay, spec_of),
    "muon": lambda groups, config, spec_of: Muon(
        groups, config.learning_rate, config.weight_decay, config.momentum, config.betas, config.epsilon,
        spec_of=spec_of,
    ),
}  # fmt: skip


def build_optimizer(
    groups: Groups, config: OptimizerConfig, spec_of: ShardSpecOf = replicated
) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names; groups: see `default_groups`; `spec_of`: how a parameter is sharded."""
    optimizer = OPTIMIZERS[config.name](groups, config, spec_of)
    for group in optimizer.param_groups:
        group.setdefault("lr_scale", 1.0)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate`, times the group's `lr_scale`, in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def default_groups(model: nn.Module) -> Groups:
    """Return three groups: matrices, tables and kernels, and vectors (norms, biases), which are not decayed.

    A module with an `lr_scale` has groups of its own. What is on `meta`, as offloaded weights are, has an update rule
    of its own.

    Keys of a group: `params`; `muon` (True if Muon may orthogonalize the update); optional `weight_decay`, which
    replaces the config's; optional `lr_scale`, a factor on the learning rate.
    """
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, _ConvNd))
        for parameter in module.parameters(recurse=False)
    }
    scales = {
        id(parameter): scale
        for module in model.modules()
        if isinstance(scale := getattr(module, "lr_scale", None), float)
        for parameter in module.parameters()
    }
    groups: dict[float, Groups] = {}
    for scale in (1.0, *sorted(set(scales.values()) - {1.0})):
        groups[scale] = [
            {"params": [], "muon": True, "lr_scale": scale},
            {"params": [], "muon": False, "lr_scale": scale},
            {"params": [], "muon": False, "lr_scale": scale, "weight_decay": 0.0},
        ]
    for parameter in (one for one in model.parameters() if one.requires_grad and not one.is_meta):
        matrices, others, vectors = groups[scales.get(id(parameter), 1.0)]
        other = id(parameter) in tables or parameter.ndim > 3
        (vectors if parameter.ndim < 2 else others if other else matrices)["params"].append(parameter)
    return [group for own in groups.values() for group in own if group["params"]]
