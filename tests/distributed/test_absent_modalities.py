"""Ranks whose rows lack what others have: nobody waits for ever, and the step is that of one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from openm6.core.run_folder import RunFolder
from openm6.data.mixture import Component, MixtureSampler
from openm6.data.packing import Packer
from openm6.data.prepare import ExampleTransform
from openm6.data.quarantine import Quarantine
from openm6.data.sources import open_sources
from openm6.distributed.process_group import ProcessGroupContext
from openm6.distributed.processes import DistributedContext
from openm6.modalities.batch import Batch
from openm6.train.multimodal import MultimodalTraining
from openm6.train.offloaded import open_train_step
from openm6.train.run import read_recipe
from openm6.train.step import StepReport
from tests.distributed.fleet import Fleet
from tests.distributed.test_process_group import CPU, few_steps, whole_weights
from tests.train.tiny_recipe import MODEL, tiny_recipe, write_recipe

Axes = tuple[int, int, int]
# One for each rank: an image is read, an image drawn, audio given, a number predicted.
COMPONENTS = [
    ("digits", "image_classification"),
    ("digits", "text_to_image"),
    ("spoken", "text_to_speech"),
    ("penguins", "tabular_regression"),
]
MESHES: list[Axes] = [(4, 1, 1), (1, 1, 4), (1, 2, 2), (1, 4, 1)]


def recipe_file(folder: Path, axes: Axes, components: Any = COMPONENTS, **loop: Any) -> str:
    recipe = tiny_recipe(steps=20, num_processes=1, **loop)
    recipe["mixture"] = [{"source": source, "task": task} for source, task in components]
    recipe["packing"] = {"batch_size": 4, "seq_len": 160, "num_shards": 4}
    recipe["parallel"] = dict(zip(("dp_replicate", "dp_shard", "ep"), axes, strict=True))
    recipe["model"] = MODEL
    return write_recipe(folder, recipe)


def rows_of(training: MultimodalTraining, number: int) -> Batch:
    """A row of one component alone."""
    sources = open_sources(training.recipe.sources, "train")
    source, task = COMPONENTS[number]
    mixture = MixtureSampler([Component(source=sources[source], task=task, weight=1.0)], 0)
    transform = ExampleTransform(mixture, training.modalities, 0, training.recipe.loss_weights)
    packing = training.recipe.packing.model_copy(update={"batch_size": 1, "num_shards": 1})
    return next(Packer(transform, packing, Quarantine(None, 0.5), 0, 1).batches())


def disjoint_steps(recipe: str, folder: str) -> tuple[list[StepReport], dict[str, Tensor], set[str]]:
    checked, _ = read_recipe(Path(recipe), [])
    ranks = DistributedContext(CPU, 60) if dist.is_initialized() else ProcessGroupContext()
    training = MultimodalTraining(checked, RunFolder.open(folder), CPU, ranks)
    train_step = open_train_step(training, checked.loop)
    batch = rows_of(training, ranks.rank)
    reports = [train_step.update(batch, step, 20) for step in (1, 2, 3)]
    weights = {} if checked.loop.offloaded else whole_weights(training)
    return reports, weights, set(batch.groups)


@pytest.mark.parametrize("offloaded", [False, True])
def test_four_ranks_of_four_modalities(offloaded: bool, tmp_path: Path, four: Fleet) -> None:
    """All meshes agree with one another: what each rank lacks is nothing, and not a wait."""
    loop = {"offload": {"num_gpu_layers": 0}} if offloaded else {}
    found = []
    for number, axes in enumerate(MESHES):
        recipe = recipe_file(tmp_path / str(number), axes, **loop)
        answers = four.run(disjoint_steps, recipe, str(tmp_path / f"run-{number}"))
        kinds = [kinds - {"text"} for _, _, kinds in answers]
        assert all(not one & other for place, one in enumerate(kinds) for other in kinds[place + 2 :])
        found.append(answers[0])
    (first, weights, _), *others = found
    assert first[2].loss < first[0].loss
    for reports, other, _ in others:
        assert [one.loss for one in reports] == pytest.approx([one.loss for one in first], rel=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("axes", [(1, 2, 1), (1, 1, 2), (2, 1, 1)])
def test_adapters_that_no_task_uses_stay_as_they_are(axes: Axes, tmp_path: Path, two: Fleet) -> None:
    assert math.prod(axes) == 2
    components = [("penguins", "tabular_regression")]
    alone = few_steps(recipe_file(tmp_path / "a", (1, 1, 1), components), str(tmp_path / "alone"), 2)
    before = few_steps(recipe_file(tmp_path / "b", (1, 1, 1), components), str(tmp_path / "before"), 0)
    found = two.run(few_steps, recipe_file(tmp_path / "c", axes, components), str(tmp_path / "cut"), 2)
    unused = [name for name, tensor in before[1].items() if torch.equal(tensor, alone[1][name])]
    assert any("adapters" in name for name in unused)
    for name, tensor in alone[1].items():
        torch.testing.assert_close(found[0][1][name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    assert all(torch.equal(found[0][1][name], before[1][name]) for name in unused)
