"""`openm6 train`: from a recipe file to a training task, a run folder and a trained model."""

import json
import logging
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from openm6 import __version__
from openm6.checkpoint.folder import list_checkpoints
from openm6.core.config import apply_overrides, build, read_yaml
from openm6.core.device import resolve_device
from openm6.core.errors import CheckpointError, ConfigError, OpenM6Error, nearest
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.distributed.config import ParallelConfig
from openm6.distributed.process_group import ProcessGroupContext, launched, restarted
from openm6.kernels.probe import capabilities
from openm6.train.audio_codec import AudioCodecRecipe, AudioSubject
from openm6.train.codec import CodecRecipe, CodecTraining
from openm6.train.image_codec import ImageCodecRecipe, ImageSubject
from openm6.train.loop import TrainResult, gpu_failures, refuse_overwriting, train
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MultimodalRecipe, fit_batch_size, fit_learning_rate
from openm6.train.start import with_start
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
    """Return a recipe's file: a path, or a packaged one, such as `demo` or `recipes/demo.yaml`; else ConfigError."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{path.stem}.yaml"
    if shipped.is_file() and str(path.parent) in (".", "recipes"):
        return shipped
    known = sorted(recipe.stem for recipe in SHIPPED.glob("*.yaml"))
    raise ConfigError(f"no recipe at {name!r}: check the path, or use a shipped one; {nearest(path.stem, known)}")


def read_recipe(path: Path, overrides: list[str]) -> tuple[Recipe, dict[str, Any]]:
    """Return a checked recipe and its plain values; ConfigError, which names it, for a wrong kind, key or value."""
    values = apply_overrides(read_yaml(path), overrides)
    kind = str(values.get("kind", "multimodal"))
    if kind not in TRAININGS:
        raise ConfigError(f"{path}: no kind of training is called {kind!r}; {nearest(kind, sorted(TRAININGS))}")
    return build(TRAININGS[kind][0], values, str(path)), values


def run_folder(recipe: str, out: Path | None) -> RunFolder:
    """The folder of a run; by default runs/NAME of the recipe."""
    return RunFolder(out or Path("runs") / Path(recipe).stem)


def train_recipe(
    recipe: str,
    overrides: list[str] | None = None,
    resume: bool = False,
    out: Path | None = None,
    device_name: str = "auto",
) -> TrainResult | None:
    """Train by a recipe into `out` (default runs/NAME), as one of several ranks if torchrun started this process.

    Only rank 0 writes, and only it returns a result. After a restart by the launcher the run is resumed. Resuming reads
    the settings that the run began with from its own config.yaml; overrides come on top. `device_name`: as for
    `resolve_device`. Raise as `train`; ConfigError: an unusable recipe, no such device, or no run to resume in `out`.
    """
    device, path = resolve_device(device_name), Path(recipe)
    run, parallel = run_folder(recipe, out), ParallelConfig()
    failure: OpenM6Error | None = None
    # A failure is kept until the ranks are connected, so that all report it together.
    try:
        path = recipe_path(recipe)
        if resume and not run.started:
            raise ConfigError(
                f"{run.path} holds no run to go on with: name the run's folder with --out, or leave --resume out "
                "to start one there"
            )
        # What an attempt before a restart left is gone on with; without a checkpoint, settings may be of an older run.
        if run.config.is_file() and (resume or (restarted() and list_checkpoints(run.checkpoints))):
            path = run.config
        resume = resume or restarted()
        checked, values = read_recipe(path, overrides or [])
        refuse_overwriting(run, resume)
        if isinstance(checked, MultimodalRecipe):
            parallel, start = checked.parallel, Path(checked.model.start or ".")
            if path.parent == SHIPPED and start.parts[:1] == ("runs",) and not start.exists():
                raise CheckpointError(f"there is no run at {start}: make it with the commands at the head of {path}")
        elif launched():
            raise ConfigError("a codec is trained by one process: leave --nproc out")
    except OpenM6Error as error:
        failure = error
    ranks = ProcessGroupContext()
    if launched():
        # torch's distributed tensors take seconds to import: a process alone is spared them.
        from openm6.distributed.processes import DistributedContext  # noqa: PLC0415

        ranks = DistributedContext(device, parallel.timeout_seconds)
    if not ranks.is_main_process:
        get_log().setLevel(logging.ERROR)
    with ranks.guard():
        if failure is not None:
            raise failure
        _check_alike(ranks, values)
        written = values if path == run.config else None
        checked, values = _completed(checked, values, run, device, ranks, begun=bool(resume and written))
        run = RunFolder.open(run.path)
        with run.lock() if ranks.is_main_process else nullcontext(), gpu_failures(checked.loop):
            get_log().info(str(capabilities(device)))
            training = TRAININGS[checked.kind][1](checked, run, device, ranks)
            settings = values if ranks.is_main_process and (values is not written or overrides) else None
            result = train(training, checked.loop, run, resume, settings=settings)
        _log_next_steps(checked, run.path)
    return result if ranks.is_main_process else None


def train_values(values: dict[str, Any], where: str, run: RunFolder, device_name: str = "auto") -> TrainResult:
    """Train by the plain values of a multimodal recipe, which errors call `where`, in one process; raise as `train`."""
    device, recipe = resolve_device(device_name), build(MultimodalRecipe, values, where)
    chosen, values = _completed(recipe, values, run, device, ProcessGroupContext())
    assert isinstance(chosen, MultimodalRecipe)
    with gpu_failures(chosen.loop):
        training = MultimodalTraining(chosen, RunFolder.open(run.path), device)
    return train(training, chosen.loop, run, settings=values)


def _completed(
    recipe: Recipe, values: dict[str, Any], run: RunFolder, device: torch.device, ranks: ProcessGroupContext,
    begun: bool = False,
) -> tuple[Recipe, dict[str, Any]]:  # fmt: skip
    """Return recipe and plain values with what the start and, unless a run has begun, width and device decide."""
    if isinstance(recipe, MultimodalRecipe):
        recipe, values = with_start(recipe, values, run)
    return (recipe, values) if begun else with_batch_size(*with_learning_rate(recipe, values), device, ranks)


def with_learning_rate(recipe: Recipe, values: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """Return recipe and plain values with the learning rate of the model's width, if it is not the default."""
    optimizer = recipe.loop.optimizer
    rate = fit_learning_rate(recipe) if isinstance(recipe, MultimodalRecipe) else optimizer.learning_rate
    if rate == optimizer.learning_rate:
        return recipe, values
    get_log().info(f"learning rate {rate:.2g}, by the model's width")
    loop = values.get("loop", {})
    values = {**values, "loop": {**loop, "optimizer": {**loop.get("optimizer", {}), "learning_rate": rate}}}
    chosen = recipe.loop.model_copy(update={"optimizer": optimizer.model_copy(update={"learning_rate": rate})})
    return recipe.model_copy(update={"loop": chosen}), values


def with_batch_size(
    recipe: Recipe, values: dict[str, Any], device: torch.device, ranks: ProcessGroupContext
) -> tuple[Recipe, dict[str, Any]]:
    """Return recipe and values of a new run with a number of rows, if `packing.batch_size` is auto, on a GPU."""
    if not isinstance(recipe, MultimodalRecipe) or recipe.packing.batch_size != "auto" or device.type != "cuda":
        return recipe, values
    free = min(ranks.gather(torch.cuda.mem_get_info(device)[0]))
    rows = fit_batch_size(recipe, free, ranks.size)
    get_log().info(f"{rows} rows of {recipe.packing.seq_len} tokens fit into a step (packing.batch_size=auto)")
    values = {**values, "packing": {**values.get("packing", {}), "batch_size": rows}}
    packing = recipe.packing.model_copy(update={"batch_size": rows})
    return recipe.model_copy(update={"packing": packing}), values


def _log_next_steps(recipe: Recipe, path: Path) -> None:
    if isinstance(recipe, MultimodalRecipe):
        folder, generate = shlex.quote(str(path)), ""
        tasks = (recipe.task(component.task) for component in recipe.mixture)
        if task := next((task for task in tasks if not task.contrastive), None):
            asked = "--series NAME=1,2,3" if "series" in task.inputs else "--text 'your question'"
            needs_column = task.output_modality == "numbers" and "series" not in task.inputs
            column = " --column COLUMN" if needs_column else ""
            generate = f"  openm6 generate {folder} {asked} --output {task.output_modality}{column}\n"
        get_log().info(f"next:\n  openm6 evaluate {folder}\n{generate}  openm6 serve {folder} --playground")


def _check_alike(ranks: ProcessGroupContext, values: dict[str, Any]) -> None:
    """Raise ConfigError if a rank was started with another recipe or another version than the rest."""
    versions = f"OpenM6 {__version__} with torch {torch.__version__}"
    described = ranks.gather((versions, json.dumps(values, sort_keys=True, default=str)))
    for rank, (other, recipe) in enumerate(described):
        if other != described[0][0]:
            raise ConfigError(f"rank {rank} runs {other}, rank 0 {described[0][0]}: install the same on all machines")
        if recipe != described[0][1]:
            raise ConfigError(f"rank {rank} was started with another recipe than rank 0: start all with the same one")
