"""Sorting a model's parameters into the groups that an optimizer treats alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd


def default_groups(model: nn.Module, embeddings: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Three groups: matrices, tables and kernels, and vectors (norms, biases), which are not decayed.

    Keys of a group: `params`; `muon` (True where Muon may orthogonalise the update); optional `weight_decay`, which
    takes the place of the config's; optional `rate_scale`, a factor on the learning rate.

    Args:
        model: only its parameters that require gradients are taken, each once.
        embeddings: prefixes of parameter names that are tables, not maps, such as an output head: Muon's premise,
            a linear map between hidden states, does not hold for them.
    """
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, _ConvNd))
        for parameter in module.parameters(recurse=False)
    }
    matrices, others, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif id(parameter) in tables or parameter.ndim > 3 or name.startswith(tuple(embeddings)):
            others.append(parameter)
        else:
            matrices.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "muon": True},
        {"params": others, "muon": False},
        {"params": vectors, "muon": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
