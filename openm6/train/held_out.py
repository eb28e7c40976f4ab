"""The loss on records that are never trained on, taken now and then while a run goes on."""

from __future__ import annotations

import torch

from openm6.base.errors import ConfigError
from openm6.data.mixture import Component, Mixture
from openm6.data.packing import Packer
from openm6.data.prepare import Preparer
from openm6.data.quarantine import Quarantine
from openm6.data.sources import open_sources
from openm6.modalities.batch import Batch as PackedBatch
from openm6.modalities.registry import Modalities
from openm6.parallel.ranks import Ranks
from openm6.train.config import HeldOutConfig
from openm6.train.hooks import Hook, Running
from openm6.train.job import Batch
from openm6.train.recipe import MultimodalRecipe
from openm6.train.step import StepReport, seed_everything

PREFIX = "held_out/"


class HeldOutHook(Hook):
    """Every `every` steps, the mean loss over the same few batches of held-out records.

    It has no state: the batches follow from the seed, and every step seeds its own draws, so a run with it takes the
    same steps as one without, and goes on after a stop as if there had been none.
    """

    name = "held_out"

    def __init__(self, config: HeldOutConfig) -> None:
        self.config = config
        self._batches: list[Batch] = []

    def start(self, run: Running) -> None:
        """Makes the batches, so that what is wrong with them is said before the first step."""
        self._run = run
        self._batches = run.job.held_out_batches(self.config.batches)

    def after_step(self, report: StepReport) -> dict[str, float]:
        if report.step % self.config.every:
            return {}
        run = self._run
        seed_everything(run.config.seed, "held out")
        run.job.model.eval()
        with torch.no_grad(), run.updater.autocast():
            found = run.job.held_out_loss(self._batches)
        run.job.ranks.settle(run.job.model)
        run.job.model.train()
        return {f"{PREFIX}{name}": value for name, value in found.items()}


def pack_held_out(
    recipe: MultimodalRecipe, modalities: Modalities, ranks: Ranks, number: int
) -> list[PackedBatch]:
    """The first batches of the recipe's mixture over its test records; each rank gets its own rows of them.

    A source that has validation records gives those instead. A row is a lane of its own, so that the rows do not
    depend on how many ranks there are. Tasks whose source has neither are left out.

    Raises:
        ConfigError: no source has validation or test records.
        TrainingError: too many of them are broken.
    """
    validation, test = open_sources(recipe.sources, "validation"), open_sources(recipe.sources, "test")
    sources = {name: source if len(source) else test[name] for name, source in validation.items()}
    components = [
        Component(source=sources[lecture.source], task=lecture.task, weight=lecture.weight)
        for lecture in recipe.mixture
        if len(sources[lecture.source])
    ]
    if not components:
        raise ConfigError(
            "loop.held_out needs validation or test records and no source of the mixture has any: raise test_share, or "
            "leave it out"
        )
    seed = recipe.loop.seed
    preparer = Preparer(Mixture(components, seed), modalities, seed, recipe.loss_weights)
    packing = recipe.packing.model_copy(update={"lanes": recipe.packing.rows})
    packer = Packer(preparer, packing, Quarantine(None, recipe.max_broken), ranks.rank, ranks.size)
    batches = packer.batches()
    return [next(batches) for _ in range(number)]
