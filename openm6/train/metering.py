"""Energy of a run: the joules of its steps and of what lies between them, by modality and task."""

# Dimensions: n tokens of one kind, E examples

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from openm6.energy.meter import SOURCES, open_meter
from openm6.energy.tracker import EnergyTracker, WorkCount
from openm6.modalities.batch import Batch
from openm6.modalities.text import TextAdapter
from openm6.models.omni import Omni
from openm6.nn.moe import MoE
from openm6.train.callbacks import Callback, RunState
from openm6.train.step import StepReport

PASSES = 6  # operations per weight that a token uses: multiply and add, once forward and twice backward


class MeterCallback(Callback):
    """Track the joules of all devices that the run uses: each rank reads its own, and they are summed.

    Log `joules` (of the run so far), `joules_per_token` and `watts` (since the last log), `energy_source`, and
    `metering_seconds`: what all this has taken of this process's time. The tracker goes into checkpoints.
    """

    name, late = "meter", True

    def __init__(self) -> None:
        self.tracker = EnergyTracker()
        self._before: dict[str, float] = {}  # joules of earlier processes of this run, by source
        self._seconds = 0.0  # of metering, in this process
        self._in_flight = 0  # steps that have begun and are not reported yet
        self._begun = False  # whether a step of this process has

    def start(self, run: RunState) -> None:
        self._run = run
        # Logged steps after the checkpoint that the run goes on from are taken again.
        lines = [line for line in run.run.read_metrics() if line.get("step", 0) > run.progress.step]
        sums = [line["joules"] for line in lines if isinstance(line.get("joules"), float)]
        lost = max(0.0, max(sums, default=0.0) - self.tracker.joules) if run.progress.step > 0 else 0.0
        if lost:
            source = str(lines[-1].get("energy_source", "estimate")).split("+")[-1]
            self._before[source] = self._before.get(source, 0.0) + lost
            self.tracker.repeated += lost
        self._meter = open_meter(gpus_of(run.train_step.device), run.config.energy.cpu_watts)
        # Joules, tokens and time at the last log.
        self._logged = (self.tracker.joules + lost, run.progress.tokens, time.perf_counter())

    def before_step(self, step: int) -> None:
        with self._timed():
            if not self._begun:  # the first line counts from here, without what the start of the run has taken
                self._begun, self._logged = True, (*self._logged[:2], time.perf_counter())
                self._read(0.0, self._begin_log)
            if not self._in_flight:  # otherwise it counts from the report of the step before
                self._since = (self._meter.joules().joules, self._run.progress.seconds)
            self._in_flight += 1

    def after_step(self, report: StepReport) -> dict[str, float]:
        with self._timed():
            stage, (joules, seconds) = self._run.training.stage, self._since
            self._in_flight -= 1
            passed = self._run.progress.seconds - seconds

            def add(spent: float) -> None:
                self.tracker.add_step(stage, spent, report.tokens, passed, report.work)
                self._update_between()

            self._since = (self._read(joules, add), self._run.progress.seconds)
        return {}

    def totals(self) -> dict[str, Any]:
        with self._timed():
            self._read_alone()
        tracker, progress, now = self.tracker, self._run.progress, time.perf_counter()
        joules, tokens, seconds = self._logged
        self._logged = (tracker.joules, progress.tokens, now)
        spent = tracker.joules - joules
        return {
            "joules": tracker.joules,
            "joules_per_token": spent / max(1, progress.tokens - tokens),
            "watts": spent / max(1e-9, now - seconds),
            "energy_source": tracker.source,
            "metering_seconds": self._seconds,
        }

    def _begin_log(self, spent: float) -> None:
        self._logged = (self.tracker.joules, *self._logged[1:])
        self._update_between()

    def state(self) -> dict[str, Any]:
        self._read_alone()
        return self.tracker.to_json()

    def load_state(self, run: RunState, state: dict[str, Any]) -> None:
        self.tracker = EnergyTracker.from_json(state)
        self._before = dict(self.tracker.by_source)

    def close(self) -> None:
        self._meter.close()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def _read(self, since: float, use: Callable[[float], None]) -> float:
        """Update the sums; call `use` with what all ranks spent since this one's was `since`; return this one's."""
        own = self._meter.joules()
        numbers = [own.by_source.get(source, 0.0) for source in SOURCES]

        def update(sums: list[float]) -> None:
            self.tracker.by_source = {
                source: self._before.get(source, 0.0) + joules
                for source, joules in zip(SOURCES, sums[1:], strict=True)
                if joules or source in self._before or source in own.by_source
            }
            use(sums[0])

        self._run.training.ranks.all_reduce_later([own.joules - since, *numbers], update)
        return own.joules

    def _read_alone(self) -> None:
        """Read between steps, if this is the only process: ranks do not come here at the same time."""
        if self._run.training.ranks.size == 1:
            self._read(0.0, lambda _: self._update_between())

    def _update_between(self) -> None:
        tracker = self.tracker
        tracker.between = max(0.0, tracker.joules - tracker.in_steps - tracker.repeated)


def gpus_of(device: torch.device) -> tuple[int, ...]:
    """Return the index of the GPU, which the device of a tensor always has; none of another device."""
    return (device.index,) if device.type == "cuda" else ()


class Attribution:
    """Operations per token: the weights of the backbone and of its adapter that the token passes.

    A text token that is only an input costs its adapter nothing, since an embedding is looked up, not multiplied.
    Attention between tokens is left out: it is equal for all modalities.
    """

    def __init__(self, model: Omni, tasks: Iterable[str]) -> None:
        """`tasks` are those of the mixture: every rank lists all of them, so that their work can be summed."""
        self._tasks = sorted(tasks)
        blocks = model.backbone.blocks
        added = [num_active(*same) for same in zip(*(block.modality_experts for block in blocks), strict=True)]
        shared = num_active(model.backbone.final_norm, *blocks) - sum(added)
        self._backbone, self._input, self._learned = {}, {}, {}
        for name, adapter in model.adapters.items():
            looked_up = {id(module.weight) for module in adapter.modules() if isinstance(module, nn.Embedding)}
            output = 0
            if isinstance(adapter, TextAdapter):  # its output layer, which may be the embedding, is for learned tokens
                looked_up.add(id(adapter.output_weight))
                output = adapter.output_weight.numel()
            multiplied = sum(weight.numel() for weight in adapter.parameters() if id(weight) not in looked_up)
            own = sum(added[number] for number in model.modality_experts_of(name))
            self._backbone[name] = PASSES * (shared + own)
            self._input[name], self._learned[name] = PASSES * multiplied, PASSES * (multiplied + output)

    def work(self, batch: Batch) -> dict[str, dict[str, WorkCount]]:
        """Return the batch's work by modality and by task; call it while the batch is still on the CPU."""
        tokens, operations = np.zeros(batch.num_examples), np.zeros(batch.num_examples)  # E
        modalities = dict.fromkeys(self._input, WorkCount(0, 0.0))
        for name, kind in batch.groups.items():
            learned = kind.weight.numpy() > 0  # n
            cost = self._backbone[name] + np.where(learned, self._learned[name], self._input[name])
            example = kind.example.numpy()
            tokens += np.bincount(example, minlength=batch.num_examples)
            operations += np.bincount(example, weights=cost, minlength=batch.num_examples)
            modalities[name] = WorkCount(len(learned), float(cost.sum()))
        of_task = {task: np.array([name == task for name in batch.tasks]) for task in self._tasks}
        tasks = {task: WorkCount(int(tokens @ chosen), float(operations @ chosen)) for task, chosen in of_task.items()}
        return {"modality": modalities, "task": tasks}


def num_active(*modules: nn.Module) -> int:
    """Parameters of modules that one token passes: of experts, those of its choices."""
    passed = sum(weight.numel() for module in modules for weight in module.parameters())
    for network in (part for module in modules for part in module.modules() if isinstance(part, MoE)):
        here = len(network.experts.up)  # of several ranks, each may hold some of the experts
        each = sum(weight.numel() // here for weight in network.experts.parameters())
        passed -= (here - network.router.config.experts_per_token) * each
    return passed
