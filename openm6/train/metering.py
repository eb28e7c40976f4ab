"""The hook that meters a run: joules of its steps and of what lies between them, carried on when it is resumed."""

from __future__ import annotations

import time
from typing import Any

import torch

from openm6.base.energy.ledger import Ledger
from openm6.base.energy.meter import Meter, open_meter
from openm6.base.energy.reading import SOURCES, Reading
from openm6.train.hooks import Hook, Running
from openm6.train.recorder import read_metrics
from openm6.train.step import StepReport


class MeterHook(Hook):
    """Keeps a ledger of the joules of all devices that the run uses: each rank reads its own, and they are summed.

    Lines get `joules` (of the run so far), `joules_per_token` and `watts` (since the last line), `energy_source`, and
    `metering_seconds`: what all this has taken of this process's time. The ledger goes into checkpoints.
    """

    name = "meter"

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._before: dict[str, float] = {}  # joules of earlier processes of this run, by source
        self._meter: Meter | None = None
        self._running: Running | None = None
        self._step = (0.0, 0.0)  # joules and seconds of training when the step began
        self._line = (0.0, 0, 0.0)  # joules, tokens and seconds of training when the last line was written
        self._taken = 0.0  # seconds of metering, in this process

    def start(self, run: Running) -> None:
        self._running = run
        self._count_repeated(run)
        self._meter = open_meter(gpus_of(run.updater.device), run.config.energy.cpu_watts)
        self._line = (self.ledger.joules, run.progress.tokens, run.progress.seconds)

    def before_step(self, step: int) -> None:
        assert self._running is not None
        began = time.perf_counter()
        self._step = (self._own().joules, self._running.progress.seconds)
        self._taken += time.perf_counter() - began

    def after_step(self, report: StepReport) -> dict[str, float]:
        assert self._running is not None
        began = time.perf_counter()
        joules, seconds = self._step
        stage, progress, spent = self._running.job.stage, self._running.progress, self._read(joules)
        self.ledger.add_step(stage, spent, report.tokens, progress.seconds - seconds, report.work)
        self._settle()
        self._taken += time.perf_counter() - began
        return {}

    def totals(self) -> dict[str, Any]:
        assert self._running is not None
        began = time.perf_counter()
        self._read_alone()
        self._taken += time.perf_counter() - began
        ledger, progress = self.ledger, self._running.progress
        joules, tokens, seconds = self._line
        self._line = (ledger.joules, progress.tokens, progress.seconds)
        spent = ledger.joules - joules
        return {
            "joules": ledger.joules,
            "joules_per_token": spent / max(1, progress.tokens - tokens),
            "watts": spent / max(1e-9, progress.seconds - seconds),
            "energy_source": ledger.source,
            "metering_seconds": self._taken,
        }

    def state(self) -> dict[str, Any]:
        self._read_alone()
        return self.ledger.to_json()

    def load_state(self, state: dict[str, Any]) -> None:
        self.ledger = Ledger.from_json(state)
        self._before = dict(self.ledger.by_source)

    def close(self) -> None:
        if self._meter is not None:
            self._meter.close()

    def _own(self) -> Reading:
        """Of this process's devices, since it began."""
        return self._meter.joules() if self._meter is not None else Reading.of({})

    def _read(self, since: float) -> float:
        """Brings the ledger's sum up to date; gives what all ranks spent since this one's sum was `since`."""
        assert self._running is not None
        own = self._own()
        numbers = [own.by_source.get(source, 0.0) for source in SOURCES]
        spent, *now = self._running.job.ranks.total([own.joules - since, *numbers])
        by_source: dict[str, float] = {
            source: self._before.get(source, 0.0) + joules
            for source, joules in zip(SOURCES, now, strict=True)
            if joules or source in self._before or source in own.by_source
        }
        self.ledger.by_source = dict(Reading.of(by_source).by_source)
        return spent

    def _read_alone(self) -> None:
        """Between steps only one process may read: ranks do not come here at the same time."""
        if self._running is not None and self._running.job.ranks.size == 1:
            self._read(0.0)
            self._settle()

    def _settle(self) -> None:
        """What no step is charged with lies between steps."""
        ledger = self.ledger
        ledger.between = max(0.0, ledger.joules - ledger.in_steps - ledger.repeated)

    def _count_repeated(self, run: Running) -> None:
        """Steps after the checkpoint that this process goes on from were paid for, and will be taken again."""
        told = [line for line in read_metrics(run.run) if line.get("step", 0) > run.progress.step]
        sums = [line["joules"] for line in told if isinstance(line.get("joules"), float)]
        lost = max(0.0, max(sums, default=0.0) - self.ledger.joules)
        if lost and told and run.progress.step > 0:
            source = str(told[-1].get("energy_source", "estimate")).split("+")[-1]
            self._before[source] = self._before.get(source, 0.0) + lost
            self.ledger.repeated += lost


def gpus_of(device: torch.device) -> tuple[int, ...]:
    """The GPU that a model on `device` uses; none for a processor."""
    if device.type != "cuda":
        return ()
    return (device.index if device.index is not None else torch.cuda.current_device(),)
