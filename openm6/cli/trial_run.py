"""The child process of `openm6 plan` on this machine: a few real steps of a recipe, a checkpoint and an evaluation."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from openm6.core.device import process_memory, resolve_device, usable_cores
from openm6.core.errors import ConfigError, OpenM6Error
from openm6.core.files import replace_text
from openm6.core.lru_cache import LRUCache
from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.evaluate.evaluator import LEAST, EvalConfig
from openm6.evaluate.results import EvalReport
from openm6.inference.load import LoadedModel
from openm6.modalities.batch import Batch
from openm6.plan.measured import STEPS, TRIAL_FILE, WARMUP_STEPS, TrialRun, end_with_parent
from openm6.train.callbacks import Callback
from openm6.train.loop import train
from openm6.train.multimodal import MultimodalTraining
from openm6.train.multimodal_data import network_seconds
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import read_recipe, recipe_path, with_batch_size
from openm6.train.step import StepReport

# The trial evaluates one of 20 and one of 4 records: two parts, since not all work of an evaluation grows with them.
DIVISORS = (20, 4)
MIN_ANSWERS = 20  # a smaller evaluation is run as a whole
TRIAL = [
    f"loop.steps={STEPS}", "loop.minutes=null", "loop.log_every=1", "loop.save_every=1000000", "loop.keep_last=1",
    "loop.tensorboard=false", "loop.schedule.warmup_steps=2",
]  # fmt: skip


class Clock(Callback):
    name = "trial_clock"
    last_step = 0.0

    def after_step(self, report: StepReport) -> dict[str, float]:
        self.last_step = time.perf_counter()
        return {}


class TrialTraining(MultimodalTraining):
    """The training task of the recipe, which evaluates parts of the test records and measures the seconds of each."""

    finish_began = 0.0
    held_out_seconds = 0.0  # of the last loss on held-out records

    def held_out_loss(self, batches: Sequence[Batch]) -> dict[str, float]:
        began = time.perf_counter()
        found = super().held_out_loss(batches)
        self.held_out_seconds = time.perf_counter() - began
        return found

    def finish(self, run: RunFolder) -> None:
        self.finish_began = time.perf_counter()
        self.evaluations: list[tuple[float, float]] = []
        super().finish(run)

    def _evaluate(self, run: RunFolder, checkpoint: Path) -> tuple[EvalReport, float]:
        # If the time decides, the smallest evaluation; `eval.seconds` may come on top.
        whole = self.recipe.eval.limited(LEAST)
        for divisor in DIVISORS if int(whole.answers) >= MIN_ANSWERS else (1,):
            part = part_of(whole, divisor)
            self.description = self.description.model_copy(update={"eval": part.model_dump(mode="json")})
            # Forget the codes of images and audio, or the second evaluation would find those of the first.
            for modality in self.modalities.values():
                for name, cache in vars(modality).items():
                    if isinstance(cache, LRUCache):
                        setattr(modality, name, LRUCache(cache.max_bytes))
            began = time.perf_counter()
            result = super()._evaluate(run, checkpoint)
            self.evaluations.append((int(part.answers) / int(whole.answers), time.perf_counter() - began))
        return result

    def _loaded(self, checkpoint: Path) -> LoadedModel:
        # The checkpoint of an offloaded model holds the settings of the whole evaluation.
        return replace(super()._loaded(checkpoint), description=self.description)


def part_of(config: EvalConfig, divisor: int) -> EvalConfig:
    config = config.limited(LEAST)
    update = {name: -(-int(getattr(config, name)) // divisor) for name in LEAST}
    return config.model_copy(update={**update, "records": max(2, update["records"])})


def run_trial(folder: Path, recipe: str, overrides: list[str], device_name: str = "auto") -> None:
    """Train a few steps of a recipe into `folder`, and write their time, memory and energy there."""
    began = time.perf_counter()
    path = recipe_path(recipe)
    whole, _ = read_recipe(path, overrides)
    if not isinstance(whole, MultimodalRecipe):
        raise ConfigError(f"{recipe} trains a codec: only multimodal recipes are planned")
    loop = whole.loop
    held_out = [f"loop.held_out.every={WARMUP_STEPS}"] if loop.held_out is not None else []
    checked, values = read_recipe(path, [*overrides, *TRIAL, *held_out])
    run, device = RunFolder.open(folder), resolve_device(device_name)
    checked, values = with_batch_size(checked, values, device, ProcessGroupContext())
    assert isinstance(checked, MultimodalRecipe)
    run.write_config(values)
    on_gpu = device.type == "cuda"
    training = TrialTraining(checked, run, device)
    total, active = training.omni.count_parameters()
    # The networks of the trial take the time of a run without `loop.minutes`.
    networks = sum(network_seconds(whole).values()) - sum(network_seconds(checked).values())
    longer = networks if any(table.networks for table in training.numbers.predictors) else 0.0
    start_seconds = time.perf_counter() - began + longer
    # Compute the first batches once: after the first epoch most codes of images and audio clips are cached.
    start, cached_batches = training.packer.state(), STEPS + checked.loop.prefetch + 1
    caches = [
        cache for modality in training.modalities.values() for cache in vars(modality).values()
        if isinstance(cache, LRUCache)
    ]  # fmt: skip
    before = [(cache.lookups, cache.misses, cache.seconds) for cache in caches]
    for _ in islice(training.batches(), cached_batches):
        pass
    training.restore(start)
    clock = Clock()
    train(training, checked.loop, run, callbacks=[clock])
    cache_uses = [
        (cache.lookups - lookups, cache.misses - misses, cache.seconds - seconds)
        for cache, (lookups, misses, seconds) in zip(caches, before, strict=True)
    ]
    trial = TrialRun(
        name=path.stem,
        machine=torch.cuda.get_device_name(device) if on_gpu else f"this processor, {torch.get_num_threads()} threads",
        step_tokens=training.tokens_per_step,
        parameters={"total": total, "active": active},
        steps=None if loop.steps == "auto" else int(loop.steps),
        minutes=loop.minutes,
        save_every=loop.save_every,
        start_seconds=start_seconds,
        seconds_before=training.seconds_before + longer,
        held_out_every=loop.held_out.every if loop.held_out is not None else None,
        held_out_seconds=training.held_out_seconds,
        save_seconds=training.finish_began - clock.last_step,
        evaluations=training.evaluations,
        report_seconds=time.perf_counter() - training.finish_began - sum(x for _, x in training.evaluations),
        cache_uses=[] if on_gpu else cache_uses,  # on a GPU, batches are made while it computes
        cached_batches=cached_batches,
        cores=usable_cores(),
        memory_peak=torch.cuda.max_memory_allocated(device) if on_gpu else process_memory("VmHWM"),
    )
    replace_text(run.path / TRIAL_FILE, trial.model_dump_json())


def main(words: list[str]) -> None:
    """Run `DEVICE RECIPE OVERRIDES… FOLDER`; an expected failure is one sentence on standard error."""
    device, recipe, *overrides, folder = words
    end_with_parent(Path(folder))
    try:
        run_trial(Path(folder), recipe, overrides, device)
    except OpenM6Error as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1:])
