"""Settings of the update rule, and the learning rate over time: a pure function of the step."""

import math
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from openm6.core.config import Config

WeightPrecision = Literal["fp32", "bf16-adafactor-momentum", "bf16-adafactor", "int8-adafactor"]
PRECISIONS: tuple[WeightPrecision, ...] = get_args(WeightPrecision)
# With its gradient and the optimizer's state.
BYTES_PER_PARAMETER: dict[WeightPrecision, int] = dict(zip(PRECISIONS, (16, 4, 2, 1), strict=True))
PRECISION_OF_BYTES: dict[int, WeightPrecision] = {size: name for name, size in BYTES_PER_PARAMETER.items()}
# Above it, a change of the second moment by (1 - beta) is less than half a step of bf16, and is rounded away.
SLOWEST_ROUNDED = 0.99


class ScheduleConfig(Config):
    """Warm-up, a stable part, then a decay over the last `decay_fraction` of the run (warmup-stable-decay)."""

    warmup_steps: int = Field(default=50, ge=0)
    decay_fraction: float = Field(default=0.2, ge=0.0, le=1.0)
    decay: Literal["sqrt", "linear"] = "sqrt"
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)  # of the full rate, at the end


def decay_start(total: int, config: ScheduleConfig) -> int:
    """Return the last step at the full learning rate, out of `total` steps."""
    return total - math.floor(total * config.decay_fraction)


def lr_multiplier(step: int, total: int | None, config: ScheduleConfig) -> float:
    """Return the factor on the learning rate in step `step` (from 1) of `total` (None: not known yet, no decay).

    The decay `1 - sqrt(x)` ends lower than a linear one of equal length (arXiv 2405.18392, section 3.2).
    """
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    if total is None:
        return warmup
    start = decay_start(total, config)
    if step <= start:
        return warmup
    done = min(1.0, (step - start) / (total - start + 1))  # below 1 in the last step, so that it still has an effect
    left = 1.0 - (math.sqrt(done) if config.decay == "sqrt" else done)
    return warmup * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)


class OptimizerConfig(Config):
    """Which update rule, and its hyperparameters; a rule ignores those of other rules.

    precision: of the blocks' weights and of their optimizer state. `fp32` is the rule that `name` names, 16 bytes per
        parameter with the gradient. The others are Adafactor's rule (optim/rules.py) with weights and momentum in
        bf16 (4 bytes), weights in bf16 (2) or int8 (1); `name` is then for embeddings, heads, norms and routers.
    """

    name: str = "adamw"
    precision: WeightPrecision = "fp32"
    learning_rate: float = Field(default=1e-3, gt=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)  # adamw, and muon's vectors and embeddings
    epsilon: float = Field(default=1e-8, gt=0.0)
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)  # muon
    moments: Literal["as weights", "bf16"] = "as weights"  # adamw: the dtype of both moments
    rounding: Literal["nearest", "stochastic"] = "nearest"  # adamw: of bf16 weights and second moments

    @model_validator(mode="after")
    def _betas_in_range(self) -> Self:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError("betas must both be at least 0 and below 1: lower them, e.g. [0.9, 0.95]")
        if self.moments == "bf16" and self.rounding == "nearest" and self.betas[1] > SLOWEST_ROUNDED:
            raise ValueError(
                f"moments of bf16 with a second beta of {self.betas[1]:g} hardly fall, as each change is rounded away: "
                f"set rounding: stochastic, or a beta of at most {SLOWEST_ROUNDED:g}"
            )
        return self
