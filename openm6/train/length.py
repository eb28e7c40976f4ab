"""The number of steps of a run: set, measured by the clock, or cut short because the held-out loss no longer falls."""

from __future__ import annotations

import math

from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.optim.config import decay_start
from openm6.train.config import LOOP_SECTION, LoopConfig

# How `steps: auto` is measured.
SKIPPED = 2  # first steps, slow because of caches, compilation and memory that is claimed
MEASURED_FRACTION = 0.4  # of the time: at first, caches of codes are still being filled and steps take longer
MIN_MEASURED = 5  # steps
TIME_FOR_STEPS = 0.96  # the rest is for evaluating and saving


class RunLength:
    """The number of steps of a run; None until it is known.

    A measured number goes into the run's config.yaml, and from then on counts as a configured one: a run resumed or
    repeated with that file takes exactly the same steps.
    """

    def __init__(self, config: LoopConfig, run: RunFolder, ranks: ProcessGroupContext | None = None) -> None:
        self._config, self._run, self._ranks = config, run, ranks or ProcessGroupContext()
        self._spent: list[float] = []  # seconds of each step
        written = run.read_config().get(LOOP_SECTION, {}).get("steps") if config.steps == "auto" else config.steps
        self.steps: int | None = written if isinstance(written, int) else None

    def reached(self, step: int) -> bool:
        return self.steps is not None and step >= self.steps

    def observe(self, step: int, seconds: float) -> None:
        """Record how long step `step` took; fix the length once enough is known."""
        if self.steps is not None or self._config.minutes is None:
            return
        self._spent.append(self._ranks.broadcast_object(seconds))  # all ranks must come to the same number
        measured, spent, budget = self._spent[SKIPPED:], sum(self._spent), self._config.minutes * 60
        enough = len(measured) >= MIN_MEASURED and spent >= budget * MEASURED_FRACTION
        slow = len(measured) >= 1 and spent >= budget / 2  # too slow to be measured well
        if not (enough or slow):
            return
        recent = measured[len(measured) // 2 :]  # the first ones fill caches that the later ones find filled
        left = budget * TIME_FOR_STEPS - spent
        self._set(step + max(0, math.floor(left / (sum(recent) / len(recent)))), step)
        get_log().info(f"{self.steps} steps fit into {self._config.minutes:g} minutes; written to {self._run.config}")

    def decay_from(self, step: int) -> bool:
        """Let the learning rate decay after this step, unless it does already; return whether that changes the run."""
        earlier = self.steps is None or decay_start(self.steps, self._config.schedule) > step
        if earlier:
            self._set(step, step)
        return earlier

    def _set(self, total: int, step: int) -> None:
        """Fix the length, in step `step`: at `total` or a later step."""
        # The steps so far were taken at the full rate: the decay must not start before them, or a repeated run differs.
        while decay_start(total, self._config.schedule) < step:
            total += 1
        self.steps = total
        if self._ranks.is_main_process:
            self._run.set_config(LOOP_SECTION, "steps", total)
