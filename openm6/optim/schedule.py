"""The learning rate over time: warm-up, stable, decay; a pure function of the step."""

from __future__ import annotations

import math

from openm6.optim.config import ScheduleConfig


def decay_start(total: int, config: ScheduleConfig) -> int:
    """Last step at the full rate, out of `total` steps."""
    return total - math.floor(total * config.decay_fraction)


def lr_multiplier(step: int, total: int | None, config: ScheduleConfig) -> float:
    """Share of the full learning rate in step `step` (the first is 1) of `total` (None: not known yet, no decay).

    The decay `1 - sqrt(x)` ends lower than a linear one at equal length (Hägele et al. 2024, arXiv 2405.18392,
    section 3.2).
    """
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    if total is None:
        return warmup
    start = decay_start(total, config)
    if step <= start:
        return warmup
    done = min(
        1.0, (step - start) / (total - start + 1)
    )  # the last step still moves: only the one after would be 1
    left = 1.0 - (math.sqrt(done) if config.decay == "sqrt" else done)
    return warmup * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)
