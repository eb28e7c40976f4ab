"""`openm6 train`: a recipe file becomes a job, a run folder and a finished training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from openm6.base.config import apply_overrides, build, nearest, read_yaml
from openm6.base.errors import ConfigError
from openm6.base.log import get_log
from openm6.base.run_folder import RunFolder
from openm6.parallel.ranks import Ranks, launched, open_ranks, own_device, restarted
from openm6.train.codec import ImageCodecJob, SoundCodecJob
from openm6.train.codec_recipe import CodecRecipe, ImageCodecRecipe, SoundCodecRecipe
from openm6.train.job import Job
from openm6.train.loop import TrainResult, refuse_overwriting, train
from openm6.train.multimodal import MultimodalJob
from openm6.train.recipe import MultimodalRecipe

Recipe = MultimodalRecipe | CodecRecipe
Build = Callable[[Any, RunFolder, torch.device, Ranks], Job]

WAYS: dict[str, tuple[type[Recipe], Build]] = {
    "multimodal": (MultimodalRecipe, MultimodalJob),
    "codec-image": (ImageCodecRecipe, lambda recipe, run, device, ranks: ImageCodecJob(recipe, device)),
    "codec-sound": (SoundCodecRecipe, lambda recipe, run, device, ranks: SoundCodecJob(recipe, device)),
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
    if kind not in WAYS:
        raise ConfigError(f"{path}: no kind of training is called {kind!r}; {nearest(kind, sorted(WAYS))}")
    return build(WAYS[kind][0], values, str(path)), values


def train_recipe(
    recipe: str, overrides: list[str] | None = None, resume: bool = False, out: Path | None = None
) -> TrainResult | None:
    """Trains by a recipe into `out` (default runs/NAME), as one of several ranks where torchrun started this process.

    Only rank 0 writes, and only it returns a result. After a restart by the launcher the run is resumed.

    Resuming reads the settings that the run began with from its own config.yaml; overrides come on top.

    Raises:
        ConfigError: the recipe is unusable.
        TrainingError, DataError, CheckpointError: as `train` says.
    """
    resume = resume or restarted()
    path = recipe_path(recipe)
    folder = out or Path("runs") / path.stem
    if resume and (folder / "config.yaml").is_file():
        path = folder / "config.yaml"
    checked, values = read_recipe(path, overrides or [])
    run = RunFolder.open(folder)
    refuse_overwriting(run, resume)
    device = own_device()
    ranks = _open_ranks(checked, device)
    if ranks.first and (path != run.config or overrides):
        run.write_config(values)
    job = WAYS[checked.kind][1](checked, run, device, ranks)  # type: ignore[union-attr]
    result = train(job, checked.loop, run, resume)
    return result if ranks.first else None


def _open_ranks(recipe: Recipe, device: torch.device) -> Ranks:
    """The ranks that train by this recipe; only the first one speaks.

    Raises:
        ConfigError: a codec, which one process trains, was started in several.
    """
    if not isinstance(recipe, MultimodalRecipe):
        if launched():
            raise ConfigError("a codec is trained by one process: leave --nproc out")
        return Ranks()
    ranks = open_ranks(device, recipe.parallel.timeout_seconds)
    if not ranks.first:
        get_log().setLevel(logging.ERROR)
    return ranks
