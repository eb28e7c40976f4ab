"""An optimizer's tensors by name, as a checkpoint holds them: saved, loaded, and divided when layers are delinked."""

# Dimensions: L layers that shared weights, g_l the gradient through layer l, G = Σ g_l the gradient of the shared ones

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from openm6.checkpoint.folder import SEPARATOR
from openm6.core.errors import CheckpointError

Moments = Literal["independent", "aligned", "reset"]

FIRST_MOMENTS = frozenset({"exp_avg", "momentum", "momentum_buffer"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "row_var", "col_var"})


def optimizer_state_dict(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's tensors, each under `parameter::tensor`, for `Snapshot.optimizer`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        if id(parameter) not in names:
            raise ValueError("the optimizer moves a parameter that is not part of the training task's model")
        for key, value in state.items():
            assert isinstance(value, Tensor), f"the optimizer's state {key!r} must be a tensor to be saved"
            tensors[f"{names[id(parameter)]}{SEPARATOR}{key}"] = value
    return tensors


def load_optimizer_state(
    tensors: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer, model: nn.Module, where: str
) -> None:
    """Replace the optimizer's state by such tensors; CheckpointError, from `where`, if one is not trained."""
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


def delink_moments(tensors: Mapping[str, Tensor], sources: Mapping[str, str], moments: Moments) -> dict[str, Tensor]:
    """Return tensors, those of an optimizer under `parameter::tensor`, for layers that no longer share weights.

    Shared moments are those of G. A layer's own first moment is 1/L of it. Its second moment is 1/L of E[G²] if the
    g_l are independent of one another, 1/L² if they are all equal; the truth is between. `sources`: new parameter name
    -> old one; `moments`: which of the two to assume; with "reset" the delinked parameters start without any.
    """
    result: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name, separator, key = full_name.partition(SEPARATOR)
        names = [new for new, old in sources.items() if old == name]
        if not names:
            result[full_name] = tensor
        elif moments != "reset" or len(names) == 1:  # what only one layer used is still its own
            factor = moment_factor(key, len(names), moments)
            result |= {f"{new}{separator}{key}": tensor * factor for new in names}
    return result


def moment_factor(key: str, uses: int, moments: Moments) -> float:
    """Return the factor on one of the optimizer's tensors when `uses` layers no longer share weights."""
    if key in FIRST_MOMENTS:
        return 1 / uses
    if key in SECOND_MOMENTS:
        return 1 / uses**2 if moments == "aligned" else 1 / uses
    return 1.0  # a count of steps, or weights
