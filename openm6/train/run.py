"""`openm6 train`: a recipe file becomes a training task, a run folder and a finished training."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from openm6 import __version__
from openm6.core.config import apply_overrides, build, read_yaml
from openm6.core.device import resolve_device
from openm6.core.errors import ConfigError, OpenM6Error, nearest
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.parallel.process_group import ProcessGroupContext, launched, restarted
from openm6.tasks.registry import TASKS
from openm6.train.audio_codec import AudioCodecRecipe, AudioSubject
from openm6.train.codec import CodecRecipe, CodecTraining
from openm6.train.image_codec import ImageCodecRecipe, ImageSubject
from openm6.train.loop import TrainResult, refuse_overwriting, train
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MultimodalRecipe
from openm6.train.training_task import TrainingTask

Recipe = MultimodalRecipe | CodecRecipe
Build = Callable[[Any, RunFolder, torch.device, ProcessGroupContext], TrainingTask]

TRAININGS: dict[str, tuple[type[Recipe], Build]] = {
    "multimodal": (MultimodalRecipe, MultimodalTraining),
    "codec-image": (ImageCodecRecipe, lambda r, run, d, ranks: CodecTraining(r, ImageSubject(r, d), d)),
    "codec-audio": (AudioCodecRecipe, lambda r, run, d, ranks: CodecTraining(r, AudioSubject(r, d), d)),
}
SHIPPED = Path(__file__).parents[1] / "recipes"


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that came with the package, as `demo` or `recipes/demo.yaml`.

    Raises:
        ConfigError: neither exists.
    """
    given = Path(name)
    if given.is_file():
        return given
    shipped = SHIPPED / f"{given.stem}.yaml"
    if shipped.is_file() and str(given.parent) in (".", "recipes"):
        return shipped
    known = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    raise ConfigError(
        f"no recipe at {name!r}: check the path, or use a shipped one; {nearest(given.stem, known)}"
    )


def read_recipe(path: Path, overrides: list[str]) -> tuple[Recipe, dict[str, Any]]:
    """A checked recipe and its plain values.

    Raises:
        ConfigError: an unknown kind, key or value; the sentence names it.
    """
    values = apply_overrides(read_yaml(path), overrides)
    kind = str(values.get("kind", "multimodal"))
    if kind not in TRAININGS:
        raise ConfigError(
            f"{path}: no kind of training is called {kind!r}; {nearest(kind, sorted(TRAININGS))}"
        )
    return build(TRAININGS[kind][0], values, str(path)), values


def train_recipe(
    recipe: str, overrides: list[str] | None = None, resume: bool = False, out: Path | None = None
) -> TrainResult | None:
    """Trains by a recipe into `out` (default runs/NAME), as one of several ranks where torchrun started this process.

    Only rank 0 writes, and only it returns a result. After a restart by the launcher the run is resumed.

    Resuming reads the settings that the run began with from its own config.yaml; overrides come on top.

    Raises:
        ConfigError: the recipe is unusable, or `out` holds no run to resume.
        TrainingError, DataError, CheckpointError: as for `train`.
    """
    device = resolve_device()
    plan = _plan(recipe, overrides or [], resume, out)
    ranks = _open_ranks(device, plan.timeout_seconds)
    if not ranks.is_main_process:
        get_log().setLevel(logging.ERROR)
    with ranks.guard():
        if plan.failure is not None:
            raise plan.failure
        assert plan.recipe is not None
        _check_alike(ranks, plan.values)
        run = RunFolder.open(plan.folder)
        settings = plan.values if ranks.is_main_process and (plan.path != run.config or overrides) else None
        training = TRAININGS[plan.recipe.kind][1](plan.recipe, run, device, ranks)  # type: ignore[union-attr]
        result = train(training, plan.recipe.loop, run, plan.resume, settings=settings)
        if isinstance(plan.recipe, MultimodalRecipe):
            get_log().info(_next_steps(plan.recipe, plan.folder))
    return result if ranks.is_main_process else None


def _open_ranks(device: torch.device, timeout_seconds: float) -> ProcessGroupContext:
    """Return the ranks of this run: this process alone, or those that the launcher started."""
    if not launched():
        return ProcessGroupContext()
    # torch's distributed tensors take seconds to import: a process alone is spared them.
    from openm6.parallel.processes import DistributedContext  # noqa: PLC0415

    return DistributedContext(device, timeout_seconds)


def _next_steps(recipe: MultimodalRecipe, folder: Path) -> str:
    """Commands for the model that was trained."""
    wanted, run = TASKS[recipe.mixture[0].task].output_modality, shlex.quote(str(folder))
    return (
        "next:\n"
        f"  openm6 evaluate {run}\n"
        f"  openm6 generate {run} --text 'your question' --output {wanted}\n"
        f"  openm6 serve {run} --playground"
    )


@dataclass
class _Plan:
    """What one process is to do; a failure is kept, so that all ranks report it together."""

    resume: bool
    folder: Path = Path()
    path: Path = Path()
    recipe: Recipe | None = None
    values: dict[str, Any] = field(default_factory=dict)
    failure: OpenM6Error | None = None

    @property
    def timeout_seconds(self) -> float:
        known = isinstance(self.recipe, MultimodalRecipe)
        return self.recipe.parallel.timeout_seconds if known else 600.0  # type: ignore[union-attr]


def _plan(recipe: str, overrides: list[str], resume: bool, out: Path | None) -> _Plan:
    plan = _Plan(resume or restarted())
    try:
        plan.path = recipe_path(recipe)
        plan.folder = out or Path("runs") / plan.path.stem
        run = RunFolder(plan.folder)
        if resume and not run.begun:
            raise ConfigError(
                f"{plan.folder} holds no run to go on with: name the run's folder with --out, or leave --resume out "
                "to start one there"
            )
        if plan.resume and run.config.is_file():
            plan.path = run.config
        plan.recipe, plan.values = read_recipe(plan.path, overrides)
        refuse_overwriting(run, plan.resume)
        if launched() and not isinstance(plan.recipe, MultimodalRecipe):
            raise ConfigError("a codec is trained by one process: leave --nproc out")
    except OpenM6Error as failure:
        plan.failure = failure
    return plan


def _check_alike(ranks: ProcessGroupContext, values: dict[str, Any]) -> None:
    """Raises ConfigError where a rank was started with another recipe or another version than the rest."""
    versions = f"OpenM6 {__version__} with torch {torch.__version__}"
    described = ranks.gather((versions, json.dumps(values, sort_keys=True, default=str)))
    for rank, (other, recipe) in enumerate(described):
        if other != described[0][0]:
            raise ConfigError(
                f"rank {rank} runs {other}, rank 0 {described[0][0]}: install the same on all machines"
            )
        if recipe != described[0][1]:
            raise ConfigError(
                f"rank {rank} was started with another recipe than rank 0: start all with the same one"
            )
