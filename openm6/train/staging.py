"""The hook that takes a model from the pseudo stage to the real one."""

from __future__ import annotations

from typing import Any

from openm6.base.errors import ConfigError
from openm6.base.log import get_log
from openm6.train.config import LOOP_SECTION
from openm6.train.hooks import Hook, Running
from openm6.train.stages import STAGES_SECTION, StagesConfig, SwitchClock, rate_after_switch
from openm6.train.step import StepReport


class StagesHook(Hook):
    """Saves the shared model when the switch is due, takes its layers apart, and warms the rate up again.

    A switch that the clock decided is written into the run's config.yaml as a step, so that a run repeated or resumed
    with that file switches at the same one.
    """

    name = "stages"

    def __init__(self, config: StagesConfig) -> None:
        self.config = config
        self.switched_at: int | None = None
        self._clock = SwitchClock(config.switch)

    def before_load(self, run: Running, state: dict[str, Any]) -> None:
        if state["switched_at"] is not None:
            run.updater.delink("reset")

    def start(self, run: Running) -> None:
        self._run = run
        if self.switched_at is None and run.job.stage != "pseudo":
            raise ConfigError(
                "loop.stages is given, but no layers of the model share weights: "
                "add sharing: all to model.overrides"
            )

    def before_step(self, step: int) -> None:
        if self.switched_at is None and self._due():
            self._switch(step - 1)
        self._run.updater.rate_scale = rate_after_switch(step, self.switched_at, self.config)

    def after_step(self, report: StepReport) -> dict[str, float]:
        if report.applied:  # a skipped step tells nothing of how training goes
            self._clock.observe(report.loss)
        return {}

    def totals(self) -> dict[str, Any]:
        return {"stage": self._run.job.stage}

    def state(self) -> dict[str, Any]:
        return {"switched_at": self.switched_at, **self._clock.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.switched_at = state["switched_at"]
        self._clock.load_state(state)

    def _due(self) -> bool:
        run = self._run
        due = self._clock.due(run.progress.step, run.progress.seconds)
        # Losses and steps are the same on all ranks; clocks are not.
        return due if self.config.switch.minutes is None else run.job.ranks.from_first(due)

    def _switch(self, step: int) -> None:
        run = self._run
        if step:
            run.save()
        run.updater.delink(self.config.moments, self.config.noise)
        self.switched_at = step
        if self.config.switch.minutes is not None and run.job.ranks.first:
            known = run.run.read_config().get(LOOP_SECTION, {}).get(STAGES_SECTION, {})
            run.run.set_config(LOOP_SECTION, STAGES_SECTION, {**known, "switch": {"step": step}})
        get_log().info(f"each layer has weights of its own from step {step + 1} on")
