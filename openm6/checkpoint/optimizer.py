"""An optimizer's tensors by name, as a checkpoint holds them, and back into their place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from openm6.base.errors import CheckpointError
from openm6.checkpoint.shards import SEPARATOR


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors, each under `parameter::tensor`, for `Snapshot.optimizer`.

    Raises:
        ValueError: the optimizer holds a parameter that the model does not have, or a state that is not a tensor.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        if id(parameter) not in names:
            raise ValueError("the optimizer moves a parameter that is not part of the job's model")
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"the optimizer's state {key!r} must be a tensor to be saved")
            tensors[f"{names[id(parameter)]}{SEPARATOR}{key}"] = value
    return tensors


def place_optimizer(
    tensors: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer, model: nn.Module, where: str
) -> None:
    """Put tensors, named as `optimizer_tensors` names them, in place of the optimizer's state.

    Raises:
        CheckpointError: one is of a parameter that the optimizer does not move; `where` names their origin.
    """
    parameters = dict(model.named_parameters())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    for full_name, tensor in tensors:
        name, _, key = full_name.partition(SEPARATOR)
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in trained:
            raise CheckpointError(
                f"{where} has state for {name!r}, which is not trained here: "
                "go on with the config of that run, or start a new one"
            )
        # Steps are counted on the host, which spares a wait for the device.
        optimizer.state[parameter][key] = tensor.to("cpu" if key == "step" else parameter.device)
