"""The hook that meters a run: joules of its steps and of what lies between them, carried on when it is resumed."""

from __future__ import annotations

from typing import Any

import torch

from openm6.base.energy.meter import Meter, open_meter
from openm6.base.energy.reading import Reading
from openm6.train.hooks import Hook, Running
from openm6.train.step import StepReport


class MeterHook(Hook):
    """Counts joules by source, of the devices that this process uses.

    Lines get `joules` (of the run so far), `joules_per_token` and `watts` (since the last line) and `energy_source`.
    """

    name = "meter"

    def __init__(self) -> None:
        self._before: dict[str, float] = {}  # of earlier processes of this run
        self._meter: Meter | None = None
        self._running: Running | None = None
        self._line = (0.0, 0, 0.0)  # joules, tokens and seconds when the last line was written

    def start(self, run: Running) -> None:
        self._running = run
        self._meter = open_meter(gpus_of(run.updater.device))
        self._line = (self._reading().joules, run.progress.tokens, run.progress.seconds)

    def after_step(self, report: StepReport) -> dict[str, float]:
        self._reading()
        return {}

    def totals(self) -> dict[str, Any]:
        assert self._running is not None
        reading, progress = self._reading(), self._running.progress
        joules, tokens, seconds = self._line
        self._line = (reading.joules, progress.tokens, progress.seconds)
        spent = reading.joules - joules
        return {
            "joules": reading.joules,
            "joules_per_token": spent / max(1, progress.tokens - tokens),
            "watts": spent / max(1e-9, progress.seconds - seconds),
            "energy_source": reading.source,
        }

    def state(self) -> dict[str, Any]:
        return {"by_source": dict(self._reading().by_source)}

    def load_state(self, state: dict[str, Any]) -> None:
        self._before = dict(state["by_source"])

    def close(self) -> None:
        if self._meter is not None:
            self._meter.close()

    def _reading(self) -> Reading:
        """Of the whole run so far."""
        now = self._meter.joules().by_source if self._meter is not None else {}
        names = {**self._before, **now}
        return Reading.of({name: self._before.get(name, 0.0) + now.get(name, 0.0) for name in names})


def gpus_of(device: torch.device) -> tuple[int, ...]:
    """The GPU that a model on `device` uses; none for a processor."""
    if device.type != "cuda":
        return ()
    return (device.index if device.index is not None else torch.cuda.current_device(),)
