"""The training loop: next batch, step, log, evaluate, save; every kind of training is a TrainingTask.

A step can be read in six files, in this order:

1. `train/loop.py`: `_Run.train` takes the next batch and calls the train step.
2. `train/step.py`: `TrainStep.update` runs forward, backward, clipping and the optimizer.
3. `train/multimodal.py`: `MultimodalTraining.loss` counts tokens and adds up the losses.
4. `models/omni.py`: `Omni.compute_loss` embeds the tokens, runs the backbone, and applies the heads.
5. `models/backbone.py`: the layers and their masks.
6. `nn/block.py`: attention, and a dense or sparse MLP.

`train/feed.py` has other processes make the batches. `train/workers.py` (processes of one machine), `distributed/`
(ranks) and `train/offloaded.py` are optional variants.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openm6.checkpoint.folder import list_checkpoints, read_state, refuse_damaged, step_folder, step_of
from openm6.checkpoint.load import load_training_tensors, open_saver
from openm6.checkpoint.optimizer import optimizer_state_dict
from openm6.checkpoint.save import Snapshot
from openm6.core.device import keep_freed_memory
from openm6.core.errors import CheckpointError, Interrupted, OpenM6Error, TrainingError
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.train.callbacks import (
    Best,
    Callback,
    HeldOutCallback,
    Interrupt,
    MemoryCallback,
    Progress,
    RunLength,
    SpikeCallback,
    StagesCallback,
)
from openm6.train.config import LoopConfig
from openm6.train.feed import batches_ahead
from openm6.train.metering import MeterCallback
from openm6.train.metrics import Logger, MetricAverager, open_loggers
from openm6.train.offloaded import open_train_step
from openm6.train.step import StepReport, seed_everything
from openm6.train.training_task import TrainingTask
from openm6.train.workers import Workers, number_of_workers, possible_workers


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    steps: int
    tokens: int
    seconds: float
    non_finite: int
    checkpoint: Path
    scores: dict[str, float]  # of the last evaluation; empty if there was none

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.1f} min" if self.seconds >= 100 else f"{self.seconds:.0f} s"
        skipped = f", {self.non_finite} skipped" if self.non_finite else ""
        return f"{self.steps:,} steps{skipped}, {self.tokens:,} tokens in {minutes}, saved as {self.checkpoint}"


def train(
    training: TrainingTask, config: LoopConfig, run: RunFolder, resume: bool = False,
    callbacks: Sequence[Callback] = (), settings: dict[str, Any] | None = None,
) -> TrainResult:  # fmt: skip
    """Train `training` into `run`, from the start or, with `resume`, from the latest complete checkpoint.

    `callbacks` act at every step, after those of the loop itself, in their order. `settings` become the run's
    config.yaml, but only once its checkpoint fits and all callbacks have started: a wrong setting is not written.

    A run killed and resumed equals an unbroken one bit for bit on the CPU: all randomness comes from (seed, step).

    TrainingError: the run exists and `resume` is off; too many steps in a row without a finite loss; data ended; a
    GPU's memory ran out, or the GPU is gone; evaluating or reporting the trained model failed. CheckpointError: one
    does not fit, or cannot be written. Interrupted: a signal stopped the run; it has saved itself.
    """
    with gpu_failures(config):
        state = _Run(training, config, run, resume, callbacks, settings)
    done = state.progress
    # Offloaded weights live in the train step, also during the evaluation. A GPU that is gone fails again there.
    with gpu_failures(config, lambda: state.begun + 1), closing(state.train_step):
        state.train()
        checkpoint = state.finish()
    training.ranks.close()
    return TrainResult(done.step, done.tokens, done.seconds, done.non_finite, checkpoint, state.scores)


@contextmanager
def gpu_failures(config: LoopConfig, step: Callable[[], int] | None = None) -> Iterator[None]:
    """Raise TrainingError if a GPU's memory runs out or the GPU is gone, in a step or, for None, before the first."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if step is None:
            less = "raise loop.offload.margin_gib" if config.offloaded else "add loop.offload, use more GPUs"
            raise TrainingError(
                f"the GPU's memory ran out before the first step: {less}, or take a smaller model.preset"
            ) from error
        remedy = (
            "raise loop.offload.gradient_accumulation_steps or margin_gib"
            if config.offloaded
            else "raise loop.activation_checkpointing, make batches smaller, or add loop.offload"
        )
        raise TrainingError(f"the GPU's memory ran out in step {step()}: {remedy}, then go on with --resume") from error
    except torch.AcceleratorError as error:
        when, then = "before the first step", "start it again"
        if step is not None:
            when, then = f"in step {step()}", "go on with --resume"
        raise TrainingError(
            f"the GPU failed {when} ({str(error).splitlines()[0]}): what was saved is whole, {then}"
        ) from error


def refuse_overwriting(run: RunFolder, resume: bool) -> None:
    """Raise TrainingError if the folder holds a run that is not to be resumed; call it before writing there."""
    if not resume and list_checkpoints(run.checkpoints):
        raise TrainingError(f"{run.path} already holds a run: add --resume to go on, or choose another folder")


class _Run:
    """One call of `train`: the state of a run and the order in which its parts act."""

    def __init__(
        self, training: TrainingTask, config: LoopConfig, run: RunFolder, resume: bool,
        callbacks: Sequence[Callback], settings: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        self.training, self.config, self.run, self.settings = training, config, run, settings
        self.train_step = open_train_step(training, config, run.checkpoints)
        self.callbacks: list[Callback] = [MeterCallback(), MemoryCallback(), SpikeCallback()]
        self.callbacks += [StagesCallback(config.stages)] if config.stages is not None else []
        self.held_out = HeldOutCallback(config.held_out) if config.held_out is not None else None
        self.callbacks += [self.held_out] if self.held_out is not None else []
        self.callbacks += callbacks
        self.averager, self.progress = MetricAverager(), Progress()
        self._spent = 0.0  # seconds of training that no report has accounted for
        self._accounted = 0.0  # when the last step was
        self._stopping = False
        self.workers: Workers | None = None
        self.saver = open_saver(training.ranks.layout)
        self.loggers: list[Logger] = []
        self.saved: Path | None = None
        self.scores: dict[str, float] = {}
        refuse_overwriting(run, resume)
        refuse_damaged(run.checkpoints)
        if (found := self._agreed(list_checkpoints(run.checkpoints))) is not None:
            self._restore(found)
        elif resume:
            get_log().info(f"{run.path} holds no checkpoint yet: starting from the first step")
        self.begun = self.progress.step  # the last step that has begun; on a GPU its report may be to come
        self.progress.seconds_beside += training.seconds_before
        spent = self.progress.seconds_beside + self.progress.seconds
        self.length = RunLength(config, run, training.ranks, spent)

    def _agreed(self, checkpoints: list[Path]) -> Path | None:
        """Return the newest checkpoint, if any; CheckpointError if it is not that of all ranks."""
        newest = checkpoints[-1] if checkpoints else None
        names = self.training.ranks.gather("no checkpoint" if newest is None else newest.name)
        for rank, name in enumerate(names):
            if name != names[0]:
                raise CheckpointError(
                    f"rank {rank} sees {name} in {self.run.path}, rank 0 {names[0]}: "
                    "the run's folder must be shared by all machines"
                )
        return newest

    def train(self) -> None:
        training, config, progress = self.training, self.config, self.progress
        training.model.train()
        with ExitStack() as stack:
            interrupt = stack.enter_context(Interrupt())
            for callback in self.callbacks:
                callback.start(self)
                stack.callback(callback.close)
            possible = possible_workers(training, config)
            if self.settings is not None:
                self.run.write_config(self.settings)
                self.length.write()
            workers = number_of_workers(config, possible, self.run)
            if training.ranks.is_main_process:
                self.loggers = open_loggers(self.run, progress.step, config.tensorboard)
            for logger in self.loggers:
                stack.callback(logger.close)
            keep_freed_memory()
            update: Callable[[Any, int, int | None], StepReport | None]
            if workers > 1:
                self.workers = stack.enter_context(closing(Workers(training, self.train_step, config, workers)))
                read, update = self.workers.read, self.workers.update
            else:
                read = stack.enter_context(batches_ahead(training, config, self.train_step.device))
                update = self.train_step.update_ahead if self.train_step.runs_ahead else self.train_step.update
            self._accounted = time.perf_counter()
            while not self.length.reached(progress.step):
                began = time.perf_counter()
                batch = read()
                step = self.begun + 1
                for callback in self.callbacks:
                    callback.before_step(step)
                report = update(batch, step, self.length.steps)
                self.begun, progress.cursor = step, batch.cursor
                self._spent += time.perf_counter() - began
                self._account(report)
                if self._acts_after(step):
                    self._catch_up()
                if self._due(config.evaluate_every):
                    self._evaluate()
                training.ranks.finish_sums()  # unless the step has
                training.ranks.all_reduce_later([interrupt.requested], self._stop)
                # The signal that any rank received, so that all stop after the same step; 0: none did.
                stopping = max(training.ranks.gather(interrupt.requested)) if self._stopping else 0
                if stopping:
                    self._catch_up()
                ends = self.length.reached(progress.step)
                best = self._best()
                is_best = best is not None and best.step == progress.step
                # The last step is saved later if it gets the best weights.
                if is_best or stopping or (self._due(config.save_every) and not (ends and best)):
                    self.save()
                if stopping or self.length.reached(progress.step):
                    self.saver.finish()
                if stopping and not self.length.reached(progress.step):
                    raise Interrupted(
                        f"stopped at step {progress.step}, saved as {self.saved}: go on with --resume", stopping
                    )
        self.workers = None
        self._load_best()

    def _best(self) -> Best | None:
        """Return the lowest held-out loss so far, if there is one and the run is to end with its weights."""
        best = self.held_out.best if self.held_out is not None and self.config.load_best_model_at_end else None
        return best if best is not None and best.step is not None else None

    def _load_best(self) -> None:
        """Load the weights with the lowest held-out loss and save them as those of the last step."""
        best, step = self._best(), self.progress.step
        if best is None or best.step is None or best.step == step:
            return
        folder = step_folder(self.run.checkpoints, best.step)
        self.train_step.load(folder)
        self.training.load_state({**read_state(folder)["task"], **load_training_tensors(folder)})
        get_log().info(f"the weights are those of step {best.step}, whose held-out loss is the lowest: {best.loss:.4f}")
        best.step, best.loaded, self.saved = step, best.loaded or best.step, None
        self.save()
        self.saver.finish()

    def finish(self) -> Path:
        """Evaluate and report, and return the last checkpoint; if that fails, nothing of the training is lost."""
        assert self.saved is not None
        self.train_step.optimizer.state.clear()  # the memory that only training needs
        try:
            with self.training.ranks.main_process_first():
                self.training.finish(self.run)
        except (OpenM6Error, OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise TrainingError(
                f"the run is trained and saved as {self.saved}, but evaluating or reporting it failed ({reason}): "
                "fix that and go on with --resume"
            ) from error
        return self.saved

    def _acts_after(self, step: int) -> bool:
        """Return whether anything acts on the run as it is after this step, so that its report must be there."""
        config, steps = self.config, self.length.steps
        due = any(every is not None and step % every == 0 for every in (config.evaluate_every, config.save_every))
        ends = steps is None or step >= steps
        return due or ends or any(callback.needs_report(step) for callback in self.callbacks)

    def _catch_up(self) -> None:
        """Wait for the report of the last step, if it is not there yet."""
        began = time.perf_counter()
        report = self.train_step.read_report()
        self._spent += time.perf_counter() - began
        self._account(report)

    def _stop(self, requested: list[float]) -> None:
        self._stopping = requested[0] > 0

    def _account(self, report: StepReport | None) -> None:
        """Count and log the step that is reported, if one is; raise if the loss stays non-finite."""
        if report is None:
            return
        seconds, self._spent = self._spent, 0.0
        progress = self.progress
        progress.step = report.step
        progress.tokens += report.tokens
        progress.seconds += seconds
        self.averager.add(report, seconds)
        for callback in self.callbacks:
            self.averager.add_numbers(callback.after_step(report))
        now = time.perf_counter()
        beside = max(0.0, now - self._accounted - seconds)
        self._accounted = now
        progress.seconds_beside += beside
        self.length.observe(report.step, seconds, beside)
        progress.non_finite_in_a_row = 0 if report.applied else progress.non_finite_in_a_row + 1
        if not report.applied:
            progress.non_finite += 1
            get_log().warning(f"step {report.step} skipped: loss {report.loss:g}, gradient norm {report.grad_norm:g}")
        if progress.non_finite_in_a_row > self.config.max_non_finite:
            raise TrainingError(
                f"no finite loss in {progress.non_finite_in_a_row} steps up to step {report.step}: "
                "lower loop.optimizer.learning_rate, or lengthen loop.schedule.warmup_steps"
            )
        for logger in self.loggers:
            logger.step(progress.step, self.length.steps)
        # A held-out loss has a line of its own, as a mean over several would be that of no step.
        is_held_out = self.held_out is not None and self.held_out.needs_report(progress.step)
        if progress.step % self.config.log_every and not is_held_out and not self.length.reached(progress.step):
            return
        self.training.ranks.finish_sums()
        counts = {"tokens": progress.tokens, "non_finite": progress.non_finite, "seconds": progress.seconds}
        counts["seconds_beside"] = progress.seconds_beside
        line = {"step": progress.step, **self.averager.compute(), **counts, "learning_rate": report.learning_rate}
        for callback in self.callbacks:
            line |= callback.totals()
        for logger in self.loggers:
            logger.log(line)

    def _due(self, every: int | None) -> bool:
        """Return True every so many steps and at the end, once the report is there; never for None."""
        step = self.progress.step
        return every is not None and step == self.begun and (step % every == 0 or self.length.reached(step))

    def _evaluate(self) -> None:
        seed_everything(self.config.seed, "evaluate", self.progress.step)
        with self.train_step.evaluation():
            self.scores = self.training.evaluate(self.progress.step)
        for logger in self.loggers if self.scores else []:
            logger.log({"step": self.progress.step, "evaluation": self.scores})

    def save(self) -> None:
        """Write a checkpoint of the run as it is now, unless there is one."""
        if self.saved is not None and step_of(self.saved) == self.progress.step:
            return
        self.training.ranks.finish_sums()
        if self.workers is not None:
            self.workers.collect()
        self.progress.cursor = self.training.merge_cursors(self.training.ranks.gather(self.progress.cursor))
        ranks, alone = self.training.ranks, self.training.ranks.layout is None
        # Rank 0 alone may write for longer than a collective operation waits.
        with ranks.main_process_first() if alone else nullcontext():
            if ranks.is_main_process or not alone:
                self.saved = self.saver.begin(self._snapshot(), self.run.checkpoints, self.config.keep_last)
        self.saved = ranks.broadcast_object(self.saved)

    def _snapshot(self) -> Snapshot:
        step, extra, best = self.train_step, self.training.state(), self._best()
        tensors = {name: value for name, value in extra.items() if isinstance(value, Tensor)}
        state = {
            "progress": asdict(self.progress),
            "optimizer": self.config.optimizer.name,
            "stage": self.training.stage,
            "precision": self.config.optimizer.precision,
            "averager": self.averager.state(),
            "scores": self.scores,
            "callbacks": {callback.name: callback.state() for callback in self.callbacks},
            "task": {name: value for name, value in extra.items() if not isinstance(value, Tensor)},
        }
        files = self.training.files(last=self.length.reached(self.progress.step))
        model, kept = self.training.model, None if best is None else best.step
        moments, shards = optimizer_state_dict(step.optimizer, model), (step.shards(), step.num_shards)
        return Snapshot(self.progress.step, model, moments, state, tensors, files, *shards, kept=kept)

    def _restore(self, folder: Path) -> None:
        state = read_state(folder)
        if "progress" not in state:
            raise CheckpointError(
                f"{folder} is an imported model that was never trained: "
                "name it in the recipe as model.start, and another folder as --out"
            )
        if state["optimizer"] != self.config.optimizer.name:
            raise CheckpointError(
                f"{folder} was trained with {state['optimizer']}, not {self.config.optimizer.name}: "
                "set loop.optimizer.name back, or start a new run"
            )
        for callback in self.callbacks:
            if callback.name in state["callbacks"]:
                callback.load_state(self, state["callbacks"][callback.name])
        if state["stage"] != self.training.stage:
            raise CheckpointError(
                f"{folder} is of the {state['stage']} stage, this run is in the {self.training.stage} stage: "
                f"convert it with openm6 convert, or set model.overrides.sharing and loop.stages back"
            )
        precision = self.config.optimizer.precision
        if state["precision"] != precision:
            raise CheckpointError(
                f"{folder} holds weights of precision {state['precision']}, this run trains {precision}: "
                f"convert it with openm6 convert, or set loop.optimizer.precision={state['precision']}"
            )
        self.train_step.load(folder)
        self.training.load_state({**state["task"], **load_training_tensors(folder)})
        self.averager.load_state(state["averager"])
        self.progress, self.scores, self.saved = Progress(**state["progress"]), state["scores"], folder
        self.training.restore(self.progress.cursor)
        get_log().info(f"resumed from {folder}")
