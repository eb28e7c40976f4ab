"""Callbacks of the loop, each with its own state in the checkpoints; how long a run is; and signals to stop."""

import math
import signal
import threading
from dataclasses import asdict, dataclass, field, replace
from types import FrameType
from typing import Any, Protocol, Self

import torch

from openm6.checkpoint.folder import list_checkpoints, step_of
from openm6.core.device import process_memory, reset_peak_memory
from openm6.core.errors import ConfigError
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.distributed.worker_pool import children, handled_stops
from openm6.optim.config import decay_start
from openm6.plan.measured import TIME_FOR_STEPS, time_for_steps
from openm6.train.config import LOOP_SECTION, HeldOutConfig, LoopConfig, StagesConfig
from openm6.train.step import StepReport, TrainStep, seed_everything
from openm6.train.training_task import TrainingTask

HELD_OUT_PREFIX = "held_out/"
MIN_SWAPPED = 2**28  # bytes swapped out that are worth a warning
SPIKE_DECAY = 0.98  # fraction of the running mean that is kept per step: about the last 50 steps
SPIKE_WARMUP = 30  # steps before anything is called a spike
SPIKE_FACTOR = 6.0  # standard deviations above the mean
# How `steps: auto` is measured.
SKIPPED = 2  # first steps, slow because of caches, compilation and memory that is claimed
# Of the time, and of the part of it before the decay: at first, caches of codes are being filled and steps take longer.
MEASURED_FRACTION, MEASURED_BEFORE_DECAY = 0.4, 0.8
MIN_MEASURED = 5  # steps


@dataclass
class Progress:
    """Counts of a run so far; goes into checkpoints as it is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    seconds_beside: float = 0.0  # that no step took: simple predictors, held-out losses, saves
    non_finite: int = 0  # skipped steps
    non_finite_in_a_row: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)


class RunLength:
    """The number of steps of a run; None until it is known. A measured one goes into config.yaml, for repeated runs.

    `before`: seconds of the run's minutes that were spent before the first step of this process.
    """

    def __init__(
        self, config: LoopConfig, run: RunFolder, ranks: ProcessGroupContext | None = None, before: float = 0.0
    ) -> None:
        self._config, self._run, self._ranks, self._before = config, run, ranks or ProcessGroupContext(), before
        self._spent: list[tuple[float, float]] = []  # seconds of each step, and of what came beside it
        self.steps: int | None = None if config.steps == "auto" else config.steps

    def reached(self, step: int) -> bool:
        return self.steps is not None and step >= self.steps

    def observe(self, step: int, seconds: float, beside: float = 0.0) -> None:
        """Record how long step `step` took, and what came beside it; fix the length once enough is known."""
        if self.steps is not None or self._config.minutes is None:
            return
        self._spent.append(self._ranks.broadcast_object((seconds, beside)))  # all ranks must come to the same number
        steps, others = zip(*self._spent, strict=True)
        measured, spent = steps[SKIPPED:], sum(steps) + sum(others)
        left = time_for_steps(self._config.minutes, self._before)
        budget = left / TIME_FOR_STEPS
        fraction = min(MEASURED_FRACTION, MEASURED_BEFORE_DECAY * (1 - self._config.schedule.decay_fraction))
        enough = len(measured) >= MIN_MEASURED and spent >= budget * fraction
        slow = len(measured) >= 1 and spent >= budget / 2  # too slow to be measured well
        if not (enough or slow):
            return
        recent = measured[len(measured) // 2 :]  # the first ones fill caches that the later ones find filled
        mean = sum(recent) / len(recent) + sum(others) / len(others)
        self._set(step + max(0, math.floor((left - spent) / mean)), step)
        get_log().info(f"{self.steps} steps fit into {self._config.minutes:g} minutes; written to {self._run.config}")

    def decay_from(self, step: int) -> bool:
        """Let the learning rate decay after this step, unless it does already; return whether it decays from here on.

        A resumed run may find the length that it had chosen in this step before it was killed.
        """
        if self.steps is None or decay_start(self.steps, self._config.schedule) > step:
            self._set(step, step)
        return decay_start(self.steps or 0, self._config.schedule) == step

    def _set(self, total: int, step: int) -> None:
        """Fix the length, in step `step`: at `total` or a later step."""
        # The steps so far were taken at the full rate: the decay must not start before them, or a repeated run differs.
        while decay_start(total, self._config.schedule) < step:
            total += 1
        self.steps = total
        self.write()

    def write(self) -> None:
        """Write a length that is not the recipe's into config.yaml."""
        if self._ranks.is_main_process and self.steps not in (None, self._config.steps):
            self._run.set_config(LOOP_SECTION, "steps", self.steps)


class RunState(Protocol):
    """The part of a run that callbacks use."""

    training: TrainingTask
    config: LoopConfig
    run: RunFolder
    train_step: TrainStep
    progress: Progress
    length: RunLength

    def save(self) -> None:
        """Write a checkpoint of the run as it is now."""


class Callback:
    """Base class: every method does nothing unless it is overridden.

    `name` is the key of the callback's state in checkpoints. The methods are called in this order: `load_state` (only
    if a run is resumed), `start`, then for each step `before_step` and `after_step`, `totals` when metrics are logged,
    and `close` at the end of all whose `start` succeeded, also after a failure.
    """

    name: str
    late = False  # whether all its reports may come after the next step has begun

    def load_state(self, run: RunState, state: dict[str, Any]) -> None:
        """Restore what `state` returned, and give the model the shape of the weights, which will be loaded next."""

    def start(self, run: RunState) -> None:
        """Act before the first step of this process, when model, optimizer and progress are loaded."""

    def before_step(self, step: int) -> None:
        """Act when the batch of step number `step` is there and nothing is computed yet."""

    def needs_report(self, step: int) -> bool:
        """Return whether `after_step` must be called before the next step begins; on a GPU it is then waited for."""
        return not self.late

    def after_step(self, report: StepReport) -> dict[str, float]:
        """Act when the step is done; return numbers that are averaged over the steps until the next log."""
        return {}

    def totals(self) -> dict[str, Any]:
        """Return further entries of the metrics that are logged now, such as sums and names."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return what must survive a restart; JSON-able."""
        return {}

    def close(self) -> None:
        """Release what was opened."""


class MemoryCallback(Callback):
    """Log `memory_start` (before the first step) and `memory_peak` (since then), in bytes; warn once of swapping.

    On a GPU both are of torch's allocator. On a CPU they are of the run's processes as Linux counts them, Python and
    libraries included, and of workers only what they do not share; elsewhere nothing is logged.
    """

    name, late = "memory", True

    def start(self, run: RunState) -> None:
        self._device, self._watch_swap = run.train_step.device, run.config.offloaded
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start: int | None = torch.cuda.memory_allocated(self._device)
            return
        reset_peak_memory()  # so that loading the data does not count
        # A forked process shares the latter with this one until it writes there.
        self._start, self._inherited = process_memory("VmRSS"), process_memory("RssAnon") or 0

    def after_step(self, report: StepReport) -> dict[str, float]:
        if self._watch_swap and (swapped := process_memory("VmSwap") or 0) > MIN_SWAPPED:
            self._watch_swap = False
            get_log().warning(
                f"step {report.step}: the host has swapped out {swapped / 2**30:.1f} GiB of this run, so steps will "
                "be slow; end other programs, or lower loop.offload.host_gib and train fewer layers"
            )
        return {}

    def totals(self) -> dict[str, Any]:
        if self._device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self._device)
        elif (peak := process_memory("VmHWM")) is not None:
            for worker in map(str, children()):
                whole, *shared = (process_memory(key, worker) or 0 for key in ("VmHWM", "RssShmem", "RssFile"))
                peak += max(0, whole - sum(shared) - self._inherited)
        return {} if peak is None else {"memory_start": self._start, "memory_peak": peak}


@dataclass
class Best:
    """The lowest held-out loss of a run so far; goes into checkpoints as it is."""

    loss: float | None = None
    step: int | None = None
    since: int = 0  # losses since then
    stopped_at: int | None = None  # the step after which there were too many of them
    loaded: int | None = None  # the step whose weights the run went back to at its end


class HeldOutCallback(Callback):
    """Log the mean loss over the same few batches of held-out records every `every` steps, and find the lowest.

    The batches follow from the seed, and every step seeds its own draws, so a run with it takes the same steps as one
    without, unless it is stopped early. With `load_best_model_at_end` the last step has a loss, too.
    """

    name = "held_out"

    def __init__(self, config: HeldOutConfig) -> None:
        self.config, self.best = config, Best()

    def load_state(self, run: RunState, state: dict[str, Any]) -> None:
        self.best = Best(**state)

    def start(self, run: RunState) -> None:
        """Make the batches, so that an error in them is raised before the first step."""
        self._run = run
        chosen = run.config.early_stopping_patience is not None or run.config.load_best_model_at_end
        self._batches = run.training.held_out_batches(self.config.batches, chosen)
        kept = [None, *map(step_of, list_checkpoints(run.run.checkpoints))]
        # The run may have begun without this setting, or was converted: then the weights are gone.
        if run.config.load_best_model_at_end and self.best.step not in kept:
            self.best = replace(self.best, loss=None, step=None, since=0)
        if run.config.early_stopping_patience is None:
            self.best.stopped_at = None
        elif self.best.stopped_at is not None:
            run.length.decay_from(self.best.stopped_at)

    def needs_report(self, step: int) -> bool:
        return step % self.config.every == 0

    def after_step(self, report: StepReport) -> dict[str, float]:
        run, step = self._run, report.step
        if step % self.config.every and not (run.config.load_best_model_at_end and run.length.reached(step)):
            return {}
        seed_everything(run.config.seed, "held out")
        with run.train_step.evaluation():
            found = run.training.held_out_loss(self._batches)
        self._compare(found["loss"], step)
        return {f"{HELD_OUT_PREFIX}{name}": value for name, value in found.items()}

    def state(self) -> dict[str, Any]:
        return asdict(self.best)

    def _compare(self, loss: float, step: int) -> None:
        """Note the lowest loss; if there was none for long, the run's learning rate decays from this step on."""
        best, patience = self.best, self._run.config.early_stopping_patience
        if math.isfinite(loss) and (best.loss is None or loss < best.loss):
            best.loss, best.step, best.since, best.loaded = loss, step, 0, None
            return
        best.since += 1
        if patience is not None and best.since >= patience and self._run.length.decay_from(step):
            best.stopped_at = step
            get_log().info(
                f"held-out loss {loss:.4f} after step {step}, and the lowest, {best.loss or math.nan:.4f}, was that of "
                f"step {best.step}: the learning rate decays now, and the run ends after step {self._run.length.steps}"
            )


class StagesCallback(Callback):
    """Save the shared model when the switch is due, copy the weights for each layer, and warm up the learning rate."""

    name = "stages"

    def __init__(self, config: StagesConfig) -> None:
        self.config = config
        self.switched_at: int | None = None
        self._losses: list[float] = []  # of the last steps, for a plateau

    def load_state(self, run: RunState, state: dict[str, Any]) -> None:
        self.switched_at, self._losses = state["switched_at"], list(state["losses"])
        if self.switched_at is not None:
            run.train_step.delink("reset")

    def start(self, run: RunState) -> None:
        self._run = run
        if self.switched_at is None and run.training.stage != "pseudo":
            raise ConfigError(
                "loop.stages is given, but no layers of the model share weights: add sharing: all to model.overrides"
            )

    def before_step(self, step: int) -> None:
        if self.switched_at is None and self.due():
            self._switch(step - 1)
        if self.switched_at is not None and self.config.warmup_steps:
            self._run.train_step.lr_scale = min(1.0, (step - self.switched_at) / self.config.warmup_steps)

    def needs_report(self, step: int) -> bool:
        return self.switched_at is None

    def after_step(self, report: StepReport) -> dict[str, float]:
        plateau = self.config.switch.plateau
        if report.applied and plateau is not None:  # a skipped step is no evidence about the training
            self._losses = [*self._losses, report.loss][-2 * plateau.window :]
        return {}

    def totals(self) -> dict[str, Any]:
        return {"stage": self._run.training.stage}

    def state(self) -> dict[str, Any]:
        return {"switched_at": self.switched_at, "losses": self._losses}

    def due(self) -> bool:
        """Return whether the next step is to be the first one with weights of each layer's own."""
        switch, progress = self.config.switch, self._run.progress
        if switch.step is not None:
            return progress.step >= switch.step
        if switch.minutes is not None:  # losses and steps are the same on all ranks; clocks are not
            return self._run.training.ranks.broadcast_object(progress.seconds >= 60 * switch.minutes)
        plateau, losses = switch.plateau, self._losses
        if plateau is None or len(losses) < 2 * plateau.window:
            return False
        before, later = sum(losses[: plateau.window]), sum(losses[plateau.window :])
        return later > before - plateau.improvement * abs(before)  # a loss may be negative

    def _switch(self, step: int) -> None:
        run = self._run
        if step:
            run.save()
        run.train_step.delink(self.config.moments, self.config.noise)
        self.switched_at = step
        if self.config.switch.minutes is not None and run.training.ranks.is_main_process:
            known = run.run.read_config().get(LOOP_SECTION, {}).get("stages", {})
            run.run.set_config(LOOP_SECTION, "stages", {**known, "switch": {"step": step}})
        get_log().info(f"each layer has weights of its own from step {step + 1} on")


class SpikeCallback(Callback):
    """Count and report `spikes`: losses far above their running mean."""

    name, late = "spikes", True

    def __init__(self) -> None:
        self.count, self.mean, self.variance, self.seen = 0, 0.0, 0.0, 0

    def after_step(self, report: StepReport) -> dict[str, float]:
        if self.observe(report.loss):
            self.count += 1
            get_log().warning(f"step {report.step}: loss spike, {report.loss:.3f} after a mean of {self.mean:.3f}")
        return {}

    def totals(self) -> dict[str, Any]:
        return {"spikes": self.count}

    def observe(self, loss: float) -> bool:
        """Return whether `loss` is a spike; it moves the mean only as far as the bound, so a series is detected too."""
        if not math.isfinite(loss):
            return False
        bound = self.mean + SPIKE_FACTOR * math.sqrt(self.variance) + 1e-3 * abs(self.mean)
        spike = self.seen >= SPIKE_WARMUP and loss > bound
        value = min(loss, bound) if spike else loss
        self.seen += 1
        decay = min(SPIKE_DECAY, 1 - 1 / self.seen)  # a plain mean at first
        difference = value - self.mean
        self.mean += (1 - decay) * difference
        self.variance = decay * (self.variance + (1 - decay) * difference * difference)
        return spike

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state(self, run: RunState, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Interrupt:
    """While entered, a signal to stop is kept in `requested`; a further SIGINT raises KeyboardInterrupt."""

    requested = 0  # number of the first signal

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        self._previous = {number: signal.signal(number, self._handle) for number in handled_stops() if in_main}
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = number
            get_log().info("stopping after this step; press Ctrl-C again to stop at once without saving")
        elif number == signal.SIGINT:  # `timeout` and others send SIGTERM both to a process and to its group
            raise KeyboardInterrupt
