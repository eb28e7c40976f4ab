"""Update rules that need whole matrices, on models that are cut: equal to one process, and read by other meshes."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from openm6.checkpoint.load import load_optimizer
from openm6.checkpoint.optimizer import optimizer_state_dict
from openm6.checkpoint.save import Snapshot
from openm6.checkpoint.sharded import ShardedSaver
from openm6.core.run_folder import RunFolder
from openm6.distributed.fsdp import shard_spec_of, with_offsets
from openm6.distributed.process_group import ProcessGroupContext
from openm6.distributed.processes import DistributedContext
from openm6.optim.muon import Muon
from openm6.train.multimodal import MultimodalTraining
from openm6.train.run import read_recipe
from openm6.train.step import StepReport, TrainStep
from tests.distributed.fleet import Fleet
from tests.distributed.test_process_group import CPU, few_steps
from tests.train.tiny_recipe import MODEL, tiny_recipe, write_recipe

Axes = tuple[int, int, int]
STEPS = 4


def recipe_file(folder: Path, axes: Axes, name: str) -> str:
    recipe = tiny_recipe(steps=20, optimizer={"name": name, "learning_rate": 0.003}, num_processes=1)
    recipe["packing"] = {"batch_size": 4, "seq_len": 160, "num_shards": 4}
    recipe["parallel"] = dict(zip(("dp_replicate", "dp_shard", "ep"), axes, strict=True))
    recipe["model"] = MODEL
    return write_recipe(folder, recipe)


@cache
def alone(name: str) -> tuple[list[StepReport], dict[str, Tensor], list[Any]]:
    with TemporaryDirectory() as folder:
        return few_steps(recipe_file(Path(folder), (1, 1, 1), name), folder, STEPS)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
@pytest.mark.parametrize("axes", [(1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1), (1, 4, 1)])
def test_every_cut_equals_one_process(name: str, axes: Axes, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    fleet: Fleet = request.getfixturevalue({2: "two", 4: "four"}[math.prod(axes)])
    reports, weights, _ = alone(name)
    found = fleet.run(few_steps, recipe_file(tmp_path, axes, name), str(tmp_path / "run"), STEPS)
    for report, other in zip(reports, found[0][0], strict=True):
        assert other.loss == pytest.approx(report.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(report.grad_norm, rel=1e-4)
    for key, tensor in weights.items():
        torch.testing.assert_close(found[0][1][key], tensor, rtol=1e-3, atol=2e-4, msg=key)


def moved_rows() -> list[Tensor]:
    """Three matrices of odd sizes, one of fewer rows than ranks, after three steps of Muon over their parts."""
    torch.manual_seed(5)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = ((7, 5), (3, 8), (6, 10, 4))
    wholes = [torch.randn(shape) for shape in shapes]
    parts = [distribute_tensor(one, mesh, [Shard(one.ndim - 2)]) for one in wholes]
    for part in parts:
        part.requires_grad_()
    cut = Muon([{"params": parts, "muon": True}], lr=0.1, spec_of=shard_spec_of)
    plain = [one.clone().requires_grad_() for one in wholes]
    uncut = Muon([{"params": plain, "muon": True}], lr=0.1)
    for _ in range(3):
        for part, one in zip(parts, plain, strict=True):
            one.grad = torch.randn(one.shape)
            part.grad = distribute_tensor(one.grad, mesh, [Shard(one.ndim - 2)])
        cut.step()
        uncut.step()
    return [(part.full_tensor() - one).abs().max().detach() for part, one in zip(parts, plain, strict=True)]


def test_a_matrix_visits_one_rank_and_comes_home(four: Fleet) -> None:
    assert all(float(difference) == 0 for rank in four.run(moved_rows) for difference in rank)


def training_of(recipe: str, folder: str) -> tuple[MultimodalTraining, TrainStep]:
    checked, _ = read_recipe(Path(recipe), [])
    ranks = DistributedContext(CPU, 60) if dist.is_initialized() else ProcessGroupContext()
    training = MultimodalTraining(checked, RunFolder.open(folder), CPU, ranks)
    return training, TrainStep(training, checked.loop)


def save_moments(recipe: str, folder: str) -> dict[str, Tensor]:
    """Two steps, then a checkpoint of all that there is."""
    training, train_step = training_of(recipe, folder)
    batches = training.batches()
    for step in (1, 2):
        train_step.update(next(batches), step, 20)
    moments = optimizer_state_dict(train_step.optimizer, training.model)
    saver = ShardedSaver(training.ranks.layout)
    state = {"optimizer": train_step.config.optimizer.name}
    saver.begin(Snapshot(2, training.model, moments, state), Path(folder), keep=1)
    saver.finish()
    dist.barrier()
    return whole_moments(training, train_step)


def load_moments(recipe: str, folder: str, checkpoint: str) -> dict[str, Tensor]:
    training, train_step = training_of(recipe, folder)
    load_optimizer(Path(checkpoint), train_step.optimizer, training.model, training.ranks.layout)
    found = whole_moments(training, train_step)
    batches = training.batches()
    train_step.update(next(batches), 1, 20)  # what was loaded is of the form that the rule wants
    return found


def whole_moments(training: MultimodalTraining, train_step: TrainStep) -> dict[str, Tensor]:
    tensors = optimizer_state_dict(train_step.optimizer, training.model)
    if training.ranks.layout is not None:
        tensors = with_offsets(training.model, tensors, training.ranks.layout)
    # Copies, for a rank's tensors go with it.
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_moments_reshard(name: str, tmp_path: Path, two: Fleet, four: Fleet) -> None:
    saved = four.run(save_moments, recipe_file(tmp_path, (1, 2, 2), name), str(tmp_path / "four"))[0]
    checkpoint = str(tmp_path / "four" / "step-2")
    assert any("experts" in key or "mlp.experts.up" in key for key in saved)
    for axes, fleet in (((1, 2, 1), two), ((1, 1, 2), two)):
        recipe = recipe_file(tmp_path / "two", axes, name)
        for found in fleet.run(load_moments, recipe, str(tmp_path / "other"), checkpoint):
            assert found.keys() == saved.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())
    found = load_moments(recipe_file(tmp_path / "one", (1, 1, 1), name), str(tmp_path / "other"), checkpoint)
    assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())
