"""The energy account of a run, from the tracker in its last checkpoint and the lines of its metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openm6.checkpoint.folder import latest, read_state
from openm6.core.config import build
from openm6.core.errors import CheckpointError
from openm6.core.run_folder import RunFolder
from openm6.energy.carbon import GPT3_JOULES_PER_TOKEN, JOULES_PER_KWH, Grid, grid
from openm6.energy.meter import EnergyConfig
from openm6.energy.tracker import EnergyTracker, EnergyUse

Lines = list[dict[str, Any]]
# Fraction of a stage's lines whose mean is its first, or its final, loss.
END_FRACTION = 0.1


def read_lines(run: RunFolder) -> Lines:
    """The averages that a run logged while training, without scores."""
    return [line for line in run.read_metrics() if isinstance(line.get("step"), int) and "evaluation" not in line]


@dataclass(frozen=True)
class EnergyAccount:
    """The joules of a run with the grid and the PUE behind them, and the losses of its stages.

    losses: stage -> mean loss at its beginning and at its end; evaluation: joules of evaluating the finished run.
    """

    tracker: EnergyTracker
    grid: Grid
    pue: float
    losses: dict[str, tuple[float, float]]
    evaluation: float = 0.0

    @property
    def joules_per_token(self) -> float:
        """Of the whole training, including the time between steps."""
        return self.tracker.joules / max(1, self.tracker.tokens)

    @property
    def of_gpt3(self) -> float:
        """Joules per token with the PUE, as a fraction of GPT-3's."""
        return self.joules_per_token * self.pue / GPT3_JOULES_PER_TOKEN

    def grams(self, joules: float) -> float:
        return self.grid.grams(joules, self.pue)

    def joules_per_point(self, stage: str) -> float | None:
        """Joules of a stage per nat by which its loss fell; None if it did not fall."""
        first, last = self.losses.get(stage, (0.0, 0.0))
        account = self.tracker.stages.get(stage)
        return account.joules / (first - last) if account is not None and first > last else None

    def to_json(self) -> dict[str, Any]:
        """The entry `energy` of report.json, and what `openm6 energy --json` writes."""
        tracker = self.tracker
        return {
            "joules": tracker.joules,
            "source": tracker.source,
            "by_source": tracker.by_source,
            "tokens": tracker.tokens,
            "joules_per_token": self.joules_per_token,
            "kwh": tracker.joules * self.pue / JOULES_PER_KWH,
            "g_co2e": self.grams(tracker.joules),
            "country": self.grid.code,
            "g_co2e_per_kwh": self.grid.grams_per_kwh,
            "grid_year": self.grid.year,
            "pue": self.pue,
            "of_gpt3_per_token": self.of_gpt3,
            "stages": {
                name: {**self._entry(use), "joules_per_point_of_loss": self.joules_per_point(name)}
                for name, use in tracker.stages.items()
            },
            "modalities": {name: self._entry(use) for name, use in tracker.modalities.items()},
            "tasks": {name: self._entry(use) for name, use in tracker.tasks.items()},
            "between_steps_joules": tracker.between,
            "repeated_joules": tracker.repeated,
            "evaluation_joules": self.evaluation,
        }

    def _entry(self, use: EnergyUse) -> dict[str, float]:
        return {
            "joules": use.joules,
            "g_co2e": self.grams(use.joules),
            "tokens": use.tokens,
            "joules_per_1000_tokens": 1000 * use.joules / max(1, use.tokens),
        }


def read_account(
    run: RunFolder, country: str | None = None, pue: float | None = None, evaluation: float = 0.0
) -> EnergyAccount:
    """The account of a run; `country` and `pue` override its settings (ConfigError); CheckpointError if not metered."""
    folder = latest(run.path)
    state = read_state(folder).get("callbacks", {}).get("meter", {})
    if not state.get("stages"):
        raise CheckpointError(f"{folder} was not metered: it is of a version before the energy meter")
    own = (run.read_config().get("loop") or {}).get("energy") or {}
    given = {name: value for name, value in (("country", country), ("pue", pue)) if value is not None}
    config = build(EnergyConfig, {**own, **given}, "the settings of energy")
    tracker = EnergyTracker.from_json(state)
    return EnergyAccount(tracker, grid(config.country), config.pue, _losses(run, tracker), evaluation)


def _losses(run: RunFolder, tracker: EnergyTracker) -> dict[str, tuple[float, float]]:
    """Mean loss over the first and over the last END_FRACTION of each stage's lines."""
    lines = [line for line in read_lines(run) if isinstance(line.get("loss"), float)]
    only = next(iter(tracker.stages)) if len(tracker.stages) == 1 else None
    found = {}
    for stage in tracker.stages:
        values = [line["loss"] for line in lines if line.get("stage", only) == stage]
        size = max(1, round(len(values) * END_FRACTION))
        if len(values) >= 2:
            found[stage] = (sum(values[:size]) / size, sum(values[-size:]) / size)
    return found
