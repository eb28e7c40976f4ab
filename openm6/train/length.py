"""How many steps a run takes: given, or measured once from the time that it may take."""

from __future__ import annotations

import math

from openm6.base.log import get_log
from openm6.base.run_folder import RunFolder
from openm6.optim.schedule import decay_start
from openm6.parallel.ranks import Ranks
from openm6.train.config import LOOP_SECTION, LoopConfig

SKIPPED = 2  # first steps, slow through caches, compilation and memory that is claimed
MEASURED_SHARE = 0.4  # of the time: at first, caches of codes are still being filled and steps take longer
MEASURED_LEAST = 5  # steps
TIME_FOR_STEPS = 0.96  # the rest is for judging and saving


class RunLength:
    """The number of steps of a run; None until it is known.

    A measured number goes into the run's config.yaml, and from then on stands like a given one: a run resumed or
    repeated with that file takes exactly the same steps.
    """

    def __init__(self, config: LoopConfig, run: RunFolder, ranks: Ranks | None = None) -> None:
        self.steps: int | None = None if config.steps == "auto" else int(config.steps)
        self._config = config
        self._run = run
        self._ranks = ranks or Ranks()
        self._spent: list[float] = []
        if self.steps is None:
            written = run.read_config().get(LOOP_SECTION, {}).get("steps")
            self.steps = written if isinstance(written, int) else None

    def reached(self, step: int) -> bool:
        return self.steps is not None and step >= self.steps

    def observe(self, step: int, seconds: float) -> None:
        """Take note of how long step `step` took; fixes the length once enough is known."""
        if self.steps is not None or self._config.minutes is None:
            return
        self._spent.append(self._ranks.from_first(seconds))  # all ranks must come to the same number
        measured, spent, budget = self._spent[SKIPPED:], sum(self._spent), self._config.minutes * 60
        believed = len(measured) >= MEASURED_LEAST and spent >= budget * MEASURED_SHARE
        pressed = len(measured) >= 1 and spent >= budget / 2  # steps too slow to be measured well
        if not (believed or pressed):
            return
        recent = measured[len(measured) // 2 :]  # the first ones fill caches that the later ones find filled
        left = budget * TIME_FOR_STEPS - spent
        self._fix(step, step + max(0, math.floor(left / (sum(recent) / len(recent)))))

    def _fix(self, step: int, total: int) -> None:
        # The steps so far were taken at the full rate: the decay must not start before them, or a repeated run differs.
        while decay_start(total, self._config.schedule) < step:
            total += 1
        self.steps = total
        if self._ranks.first:
            self._run.set_config(LOOP_SECTION, "steps", total)
        get_log().info(
            f"{total} steps fit into {self._config.minutes:g} minutes; written to {self._run.config}"
        )
