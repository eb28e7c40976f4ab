"""Pseudo-to-Real over models that are cut: equal answers at the switch, and a run that changes its ranks across it."""

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

from openm6.checkpoint.folder import latest, read_state, step_folder
from openm6.checkpoint.load import load_model
from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.distributed.processes import DistributedContext
from openm6.train.multimodal import MultimodalTraining
from openm6.train.run import read_recipe
from openm6.train.step import TrainStep, matrix_noise
from tests.checkpoint.test_sharded import together, wait_for
from tests.distributed.fleet import Fleet
from tests.distributed.recording_training import Records, run_steps
from tests.distributed.test_process_group import CPU
from tests.train.tiny_recipe import MODEL, tiny_recipe, write_recipe

Axes = tuple[int, int, int]
STEPS, SWITCH = 8, 4


def recipe_file(folder: Path, axes: Axes = (1, 1, 1), noise: float = 0.0, **overrides: Any) -> str:
    stages = {"switch": {"step": SWITCH}, "warmup_steps": 2, "noise": noise}
    recipe = tiny_recipe(steps=STEPS, save_every=3, keep_last=9, num_processes=1, stages=stages)
    recipe["packing"] = {"batch_size": 4, "seq_len": 160, "num_shards": 4}
    recipe["parallel"] = dict(zip(("dp_replicate", "dp_shard", "ep"), axes, strict=True))
    recipe["model"] = {**MODEL, "overrides": {**MODEL["overrides"], "sharing": "all", **overrides}}
    return write_recipe(folder, recipe)


def around_the_switch(recipe: str, folder: str) -> tuple[list[float], list[float]]:
    """Losses of one batch and this rank's logits' sum, before and after; and a step of either stage goes through."""
    checked, _ = read_recipe(Path(recipe), [])
    ranks = DistributedContext(CPU, 60) if dist.is_initialized() else ProcessGroupContext()
    training = MultimodalTraining(checked, RunFolder.open(folder), CPU, ranks)
    train_step = TrainStep(training, checked.loop)
    batches = training.batches()
    train_step.update(next(batches), 1, 20)
    batch = next(batches)
    answers = []
    for turn in range(2):
        with torch.no_grad():
            hidden, _ = training.omni(batch.groups, batch.meta)
            answers.append([float(training.loss(batch).loss), float(hidden.abs().sum())])
        ranks.reshard(training.model)
        if turn == 0:
            train_step.delink("independent")
    assert training.stage == "real" and training.omni.backbone.config.group_layers == (0, 1)
    first = [block.attention.qkv for block in training.omni.backbone.blocks]
    train_step.update(next(batches), 2, 20)
    train_step.update(next(batches), 3, 20)
    parts = [ranks.shard_spec(weight).local(weight) for weight in first]
    assert not torch.equal(*parts)  # each layer goes its own way from here on
    return answers[0], answers[1]


@pytest.mark.parametrize(
    ("axes", "share_routers"),
    [((1, 2, 1), False), ((1, 1, 2), True), ((1, 2, 2), True), ((2, 2, 1), False), ((1, 1, 4), False)],
)
def test_answers_are_equal_at_the_switch(
    axes: Axes, share_routers: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fleet: Fleet = request.getfixturevalue({2: "two", 4: "four"}[math.prod(axes)])
    recipe = recipe_file(tmp_path, axes, share_routers=share_routers)
    for before, after in fleet.run(around_the_switch, recipe, str(tmp_path / "run")):
        assert after == pytest.approx(before, rel=1e-6)


@cache
def unbroken() -> tuple[Records, dict[int, float], dict[str, Tensor]]:
    with TemporaryDirectory() as name:
        recipe = recipe_file(Path(name), noise=0.05)
        records, losses = run_steps(recipe, name, (1, 1, 1), 1, None)
        return records, losses, real_weights(recipe, latest(name), name)


def real_weights(recipe: str, checkpoint: Path, folder: str) -> dict[str, Tensor]:
    """The whole model of a checkpoint of the real stage, read by one process."""
    checked, _ = read_recipe(Path(recipe), [])
    training = MultimodalTraining(checked, RunFolder(Path(folder)), CPU)
    training.delink()
    load_model(checkpoint, training.model)
    return {name: tensor.detach() for name, tensor in training.model.state_dict().items()}


def test_a_run_changes_its_ranks_across_the_switch(tmp_path: Path, two: Fleet, four: Fleet) -> None:
    """Four ranks fall right after the switch, two take it again and fall, one process ends the run."""
    recipe = recipe_file(tmp_path, noise=0.05)
    records: Records = {}
    losses: dict[int, float] = {}
    plan: list[tuple[Fleet | None, Axes, int, int | None]] = [
        (four, (1, 2, 2), 1, SWITCH + 2),
        (two, (1, 1, 2), SWITCH + 1, 8),
        (None, (1, 1, 1), 7, None),
    ]
    for fleet, axes, begin, fall_at in plan:
        words: tuple[Any, ...] = (recipe, str(tmp_path), axes, begin, fall_at)
        answers = [run_steps(*words)] if fleet is None else fleet.run(run_steps, *words)
        records |= together([seen for seen, _ in answers])
        losses |= answers[0][1]
        wait_for(tmp_path, {1: SWITCH, SWITCH + 1: 6, 7: STEPS}[begin])
    expected, expected_losses, weights = unbroken()
    assert records == expected
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    stages = [read_state(step_folder(tmp_path / "checkpoints", step))["stage"] for step in (3, 4, 6, 8)]
    assert stages == ["pseudo", "pseudo", "real", "real"]
    found = real_weights(recipe, latest(tmp_path), str(tmp_path))
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=5e-4, msg=name)


def test_noise_is_that_of_each_expert() -> None:
    torch.manual_seed(0)
    stack = torch.randn(4, 30, 20) * torch.tensor([1.0, 10.0, 0.1, 1.0]).view(4, 1, 1)
    whole = matrix_noise(stack, 0.1, 7)
    torch.testing.assert_close(whole.std((1, 2)), 0.1 * stack.std((1, 2)), rtol=0.1, atol=0)
    assert torch.equal(matrix_noise(stack[2:], 0.1, 7, first=2), whole[2:])
