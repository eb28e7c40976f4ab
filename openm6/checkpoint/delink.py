"""What becomes of an optimizer's memory when layers that shared a weight set go on with one each."""

# Letters: L layers that shared a set, g_l the gradient through layer l, G = Σ g_l the gradient of the shared set

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from openm6.checkpoint.shards import SEPARATOR

Moments = Literal["independent", "aligned", "reset"]

FIRST_MOMENTS = frozenset({"exp_avg", "momentum", "momentum_buffer"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "row_var", "col_var"})


def delink_moments(
    tensors: Mapping[str, Tensor], sources: Mapping[str, str], moments: Moments
) -> dict[str, Tensor]:
    """An optimizer's tensors, each under `parameter::tensor`, for the layers that take over a shared set's.

    The moments of a shared set are those of G. A layer's own first moment is a share 1/L of it. Its second moment is
    1/L of E[G²] where the g_l are independent of one another, 1/L² where they are all alike; the truth lies between.

    Args:
        tensors: as `optimizer_tensors` gives them before the delink.
        sources: new parameter name -> old one; what it does not name keeps its tensors.
        moments: which of the two to assume; with "reset" the delinked parameters start without any.
    """
    uses = Counter(sources.values())
    kept: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.partition(SEPARATOR)
        kept.setdefault(name, {})[key] = tensor
    result = {
        f"{name}{SEPARATOR}{key}": tensor
        for name, state in kept.items() if name not in uses
        for key, tensor in state.items()
    }  # fmt: skip
    for new, old in sources.items():
        # What one layer had for itself is still its own.
        if moments == "reset" and uses[old] > 1:
            continue
        for key, tensor in kept.get(old, {}).items():
            result[f"{new}{SEPARATOR}{key}"] = tensor * moment_factor(key, uses[old], moments)
    return result


def moment_factor(key: str, uses: int, moments: Moments) -> float:
    """By how much one of the optimizer's tensors shrinks when a set of `uses` layers is taken apart."""
    if key in FIRST_MOMENTS:
        return 1 / uses
    if key in SECOND_MOMENTS:
        return 1 / uses**2 if moments == "aligned" else 1 / uses
    return 1.0  # a count of steps
