"""Pseudo-to-Real: layers share their weights first, and at the right moment go on with weights of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openm6.core.seeds import derive_seed
from openm6.distributed.process_group import ProcessGroupContext
from openm6.optim.sharding import REPLICATED, ShardSpec
from openm6.train.config import StagesConfig, SwitchConfig


class SwitchClock:
    """Decides when the switch is due; its state is in checkpoints, so a resumed run switches at the same step."""

    def __init__(self, config: SwitchConfig) -> None:
        self._config = config
        self._losses: list[float] = []

    def observe(self, loss: float) -> None:
        """Record the loss of one step."""
        if self._config.plateau is not None:
            self._losses = [*self._losses, loss][-2 * self._config.plateau.window :]

    def due(self, steps: int, seconds: float) -> bool:
        """Return True once the switch should happen, `steps` steps and `seconds` seconds into the run."""
        config = self._config
        if config.step is not None:
            return steps >= config.step
        if config.minutes is not None:
            return seconds >= 60 * config.minutes
        plateau, losses = config.plateau, self._losses
        if plateau is None or len(losses) < 2 * plateau.window:
            return False
        return sum(losses[plateau.window :]) > (1 - plateau.improvement) * sum(losses[: plateau.window])

    def state(self) -> dict[str, Any]:
        return {"losses": self._losses}

    def load_state(self, state: dict[str, Any]) -> None:
        self._losses = list(state["losses"])


def lr_after_switch(step: int, switched_at: int | None, config: StagesConfig) -> float:
    """Factor on the learning rate in step `step`, if the switch came after step `switched_at`."""
    if switched_at is None or not config.warmup_steps:
        return 1.0
    return min(1.0, (step - switched_at) / config.warmup_steps)


@torch.no_grad()
def break_symmetry(
    sources: Mapping[str, str], model: nn.Module, noise: float, seed: int, ranks: ProcessGroupContext
) -> None:
    """Add noise to matrices that layers of a delinked model hold copies of; see `matrix_noise`. All ranks call it.

    `sources` is the result of `delink`: new parameter name -> the shared one's.
    """
    uses, named = Counter(sources.values()), dict(model.named_parameters())
    for name, parameter in sorted((new, named[new]) for new, old in sources.items() if uses[old] > 1):
        if parameter.ndim > 1:
            spec = ranks.shard_spec(parameter)
            values = spec.local(parameter)
            first = ranks.first_expert(len(values)) if parameter.ndim > 2 else 0
            values.add_(matrix_noise(values, noise, derive_seed(seed, "delink", name), spec, first))


def matrix_noise(values: Tensor, noise: float, seed: int, spec: ShardSpec = REPLICATED, first: int = 0) -> Tensor:
    """Normal noise of `noise` times the deviation of each matrix; R' C, or E R' C for a stack, as `values`.

    The matrices of a stack have index `first` and following. Each is drawn from the seed and its index, on the
    CPU: the same noise whatever device the weights are on, and whichever of their rows and experts this rank holds.
    """
    stack = values if values.ndim > 2 else values.unsqueeze(0)
    start, rows = spec.rows(stack.shape[-2])
    whole, count = stack.double(), rows * stack.shape[-1]
    mean = spec.all_reduce(whole.sum((-2, -1), keepdim=True)) / count
    squares = spec.all_reduce((whole - mean).square().sum((-2, -1), keepdim=True))
    deviation = (squares / max(1, count - 1)).sqrt()  # E 1 1: that of each whole matrix
    draws = []
    for index in range(first, first + len(stack)):
        words = (index,) if values.ndim > 2 else ()
        generator = torch.Generator().manual_seed(derive_seed(seed, "matrix", *words))
        draw = torch.randn(rows, stack.shape[-1], generator=generator)
        draws.append(draw[start : start + stack.shape[-2]])
    draw = torch.stack(draws).to(values.device) * (noise * deviation.float())
    return draw.view(values.shape).to(values.dtype)
