"""The list of optimizers; adding one is a builder function and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from openm6.base.config import nearest
from openm6.base.errors import ConfigError
from openm6.optim.adafactor import Adafactor
from openm6.optim.adamw import AdamW
from openm6.optim.config import OptimizerConfig
from openm6.optim.muon import Muon
from openm6.optim.pieces import Pieces, whole

Groups = list[dict[str, Any]]
Build = Callable[[Groups, OptimizerConfig, Pieces], torch.optim.Optimizer]


def build_adamw(groups: Groups, config: OptimizerConfig, pieces: Pieces) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) in one pass over the parameters."""
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        state_dtype=torch.bfloat16 if config.moments == "bf16" else None,
        stochastic=config.rounding == "stochastic",
        pieces=pieces,
    )


def build_adafactor(groups: Groups, config: OptimizerConfig, pieces: Pieces) -> torch.optim.Optimizer:
    """Adafactor (arXiv 1804.04235): a factored second moment and no first one, so next to no memory."""
    return Adafactor(groups, lr=config.learning_rate, weight_decay=config.weight_decay, pieces=pieces)


def build_muon(groups: Groups, config: OptimizerConfig, pieces: Pieces) -> torch.optim.Optimizer:
    """Muon for hidden matrices and stacks of expert matrices, AdamW for the rest."""
    return Muon(
        groups,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        betas=config.betas,
        eps=config.epsilon,
        pieces=pieces,
    )


OPTIMIZERS: dict[str, Build] = {
    "adamw": build_adamw,
    "adafactor": build_adafactor,
    "muon": build_muon,
}


def check_optimizer_name(name: str) -> None:
    """Raises ConfigError for a name that is not in the list."""
    if name not in OPTIMIZERS:
        raise ConfigError(f"no optimizer {name!r}; {nearest(name, list(OPTIMIZERS))}")


def build_optimizer(groups: Groups, config: OptimizerConfig, pieces: Pieces = whole) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over groups as `default_groups` makes them; `pieces` says how they lie here.

    Raises:
        ConfigError: no optimizer of that name.
    """
    check_optimizer_name(config.name)
    optimizer = OPTIMIZERS[config.name](groups, config, pieces)
    for group in optimizer.param_groups:
        group.setdefault("rate_scale", 1.0)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate`, times the group's `rate_scale`, in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]
