"""Energy of a run: the joules of its steps and of what lies between them, and what they were used for."""

# Dimensions: n tokens of one kind, E examples

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn

from openm6.energy.counter import SOURCES, EnergyReading
from openm6.energy.meter import Meter, open_meter
from openm6.energy.tracker import EnergyTracker, WorkShare
from openm6.modalities.batch import Batch
from openm6.modalities.text import TextAdapter
from openm6.models.config import count_parameters
from openm6.models.omni import Omni
from openm6.train.callbacks import Callback, RunState
from openm6.train.metrics import read_metrics
from openm6.train.step import StepReport

PASSES = 6  # operations for each weight a token meets: multiply and add, forward once and backward twice


class MeterCallback(Callback):
    """Keeps a ledger of the joules of all devices that the run uses: each rank reads its own, and they are summed.

    Lines get `joules` (of the run so far), `joules_per_token` and `watts` (since the last line), `energy_source`, and
    `metering_seconds`: what all this has taken of this process's time. The ledger goes into checkpoints.
    """

    name = "meter"

    def __init__(self) -> None:
        self.ledger = EnergyTracker()
        self._before: dict[str, float] = {}  # joules of earlier processes of this run, by source
        self._meter: Meter | None = None
        self._run: RunState | None = None
        self._step = (0.0, 0.0)  # joules and seconds of training when the step began
        self._line = (0.0, 0, 0.0)  # joules, tokens and seconds of training when the last line was written
        self._taken = 0.0  # seconds of metering, in this process

    def start(self, run: RunState) -> None:
        self._run = run
        self._count_repeated(run)
        self._meter = open_meter(gpus_of(run.train_step.device), run.config.energy.cpu_watts)
        self._line = (self.ledger.joules, run.progress.tokens, run.progress.seconds)

    def before_step(self, step: int) -> None:
        assert self._run is not None
        began = time.perf_counter()
        self._step = (self._own().joules, self._run.progress.seconds)
        self._taken += time.perf_counter() - began

    def after_step(self, report: StepReport) -> dict[str, float]:
        assert self._run is not None
        began = time.perf_counter()
        joules, seconds = self._step
        stage, progress, spent = self._run.training.stage, self._run.progress, self._read(joules)
        self.ledger.add_step(stage, spent, report.tokens, progress.seconds - seconds, report.work)
        self._update_between()
        self._taken += time.perf_counter() - began
        return {}

    def totals(self) -> dict[str, Any]:
        assert self._run is not None
        began = time.perf_counter()
        self._read_alone()
        self._taken += time.perf_counter() - began
        ledger, progress = self.ledger, self._run.progress
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
        self.ledger = EnergyTracker.from_json(state)
        self._before = dict(self.ledger.by_source)

    def close(self) -> None:
        if self._meter is not None:
            self._meter.close()

    def _own(self) -> EnergyReading:
        """Of this process's devices, since it began."""
        return self._meter.joules() if self._meter is not None else EnergyReading.of({})

    def _read(self, since: float) -> float:
        """Update the ledger's sum; return what all ranks spent since this one's sum was `since`."""
        assert self._run is not None
        own = self._own()
        numbers = [own.by_source.get(source, 0.0) for source in SOURCES]
        spent, *now = self._run.training.ranks.all_reduce([own.joules - since, *numbers])
        by_source: dict[str, float] = {
            source: self._before.get(source, 0.0) + joules
            for source, joules in zip(SOURCES, now, strict=True)
            if joules or source in self._before or source in own.by_source
        }
        self.ledger.by_source = dict(EnergyReading.of(by_source).by_source)
        return spent

    def _read_alone(self) -> None:
        """Between steps only one process may read: ranks do not come here at the same time."""
        if self._run is not None and self._run.training.ranks.size == 1:
            self._read(0.0)
            self._update_between()

    def _update_between(self) -> None:
        """Attribute what no step used to the time between steps."""
        ledger = self.ledger
        ledger.between = max(0.0, ledger.joules - ledger.in_steps - ledger.repeated)

    def _count_repeated(self, run: RunState) -> None:
        """Steps after the checkpoint that this process goes on from were paid for, and will be taken again."""
        lines = [line for line in read_metrics(run.run) if line.get("step", 0) > run.progress.step]
        sums = [line["joules"] for line in lines if isinstance(line.get("joules"), float)]
        lost = max(0.0, max(sums, default=0.0) - self.ledger.joules)
        if lost and lines and run.progress.step > 0:
            source = str(lines[-1].get("energy_source", "estimate")).split("+")[-1]
            self._before[source] = self._before.get(source, 0.0) + lost
            self.ledger.repeated += lost


def gpus_of(device: torch.device) -> tuple[int, ...]:
    """Return the index of the GPU that a model on `device` uses; none for a CPU."""
    if device.type != "cuda":
        return ()
    return (device.index if device.index is not None else torch.cuda.current_device(),)


class Attribution:
    """Operations of each kind of token: active weights of the backbone, and those of its adapter where they work.

    A text token that is only read costs its adapter nothing, since an embedding is looked up, not multiplied.
    Attention between tokens is left out: it is shared by all kinds alike.
    """

    def __init__(self, model: Omni) -> None:
        self._backbone = PASSES * count_parameters(model.config).active
        self._read = {name: PASSES * _multiplied(adapter) for name, adapter in model.adapters.items()}
        self._learned = dict(self._read)
        for name, adapter in model.adapters.items():
            if isinstance(adapter, TextAdapter):  # the embedding is the output layer as well
                self._learned[name] += PASSES * adapter.embedding.weight.numel()

    def shares(self, batch: Batch) -> dict[str, dict[str, WorkShare]]:
        """The batch's work by modality and by task; call it while the batch is still on the CPU."""
        modalities: dict[str, WorkShare] = {}
        tokens, operations = np.zeros(batch.num_examples), np.zeros(batch.num_examples)  # E
        for name, kind in batch.groups.items():
            learned = kind.weight.numpy() > 0  # n
            cost = self._backbone + np.where(learned, self._learned[name], self._read[name])
            example = kind.example.numpy()
            tokens += np.bincount(example, minlength=batch.num_examples)
            operations += np.bincount(example, weights=cost, minlength=batch.num_examples)
            modalities[name] = WorkShare(len(learned), float(cost.sum()))
        tasks: dict[str, WorkShare] = {}
        for task, count, spent in zip(batch.tasks, tokens, operations, strict=True):
            before = tasks.get(task, WorkShare(0, 0.0))
            tasks[task] = WorkShare(before.tokens + int(count), before.operations + float(spent))
        return {"modality": modalities, "task": tasks}


def _multiplied(adapter: nn.Module) -> int:
    """Weights of an adapter that are multiplied, not looked up."""
    looked_up = {id(module.weight) for module in adapter.modules() if isinstance(module, nn.Embedding)}
    return sum(weight.numel() for weight in adapter.parameters() if id(weight) not in looked_up)
