"""Telling a loss spike from ordinary noise."""

from __future__ import annotations

import math

MEMORY = 0.98  # share of the running mean that is kept each step: about the last 50 steps
WARMUP = 30  # steps before anything is called a spike
FACTOR = 6.0  # standard deviations above the mean


class SpikeWatch:
    """Follows the loss by a running mean and variance; a loss far above both is a spike."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.variance = 0.0
        self.seen = 0

    def observe(self, loss: float) -> bool:
        """True if `loss` is a spike; a spike moves the mean only as far as the bound, so a run of them is told too."""
        if not math.isfinite(loss):
            return False
        bound = self.mean + FACTOR * math.sqrt(self.variance) + 1e-3 * abs(self.mean)
        spike = self.seen >= WARMUP and loss > bound
        value = min(loss, bound) if spike else loss
        self.seen += 1
        memory = min(MEMORY, 1 - 1 / self.seen)  # a plain mean at first
        difference = value - self.mean
        self.mean += (1 - memory) * difference
        self.variance = memory * (self.variance + (1 - memory) * difference * difference)
        return spike

    def state(self) -> dict[str, float]:
        return {"mean": self.mean, "variance": self.variance, "seen": self.seen}

    def load_state(self, state: dict[str, float]) -> None:
        self.mean, self.variance, self.seen = state["mean"], state["variance"], int(state["seen"])
