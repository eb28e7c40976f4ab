"""Streamed blocks on several ranks: the same as in one process, also from pseudo to real and with other ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from openm6.checkpoint.folder import SEPARATOR, latest
from openm6.checkpoint.load import open_reader, read_weight
from openm6.core.run_folder import RunFolder
from openm6.distributed.processes import DistributedContext
from openm6.optim.config import PRECISION_OF_BYTES
from openm6.train.multimodal import MultimodalTraining
from openm6.train.offloaded import OffloadedTrainStep
from openm6.train.run import read_recipe
from tests.checkpoint.test_sharded import together, wait_for
from tests.distributed.fleet import Fleet
from tests.distributed.recording_training import Records, run_steps
from tests.distributed.test_process_group import CPU
from tests.train.tiny_recipe import MODEL, tiny_recipe, write_recipe

Axes = tuple[int, int, int]
Alone = Callable[[int], tuple[dict[int, float], Path]]
STEPS, SWITCH = 6, 3


def recipe_file(folder: Path, bytes_per_parameter: int, **changes: Any) -> str:
    """A recipe of three steps, or with `stages` of more; `changes` are of its training loop."""
    optimizer = {"precision": PRECISION_OF_BYTES[bytes_per_parameter], "learning_rate": 0.002}
    loop = {"save_every": 9, "num_processes": 1, "max_grad_norm": None, "offload": {"num_gpu_layers": 1}}
    recipe = tiny_recipe(**{"steps": 3, **loop, "optimizer": optimizer, **changes})
    recipe["packing"] = {"batch_size": 4, "seq_len": 160, "num_shards": 4}
    if "stages" in changes:
        recipe["model"] = {**MODEL, "overrides": {**MODEL["overrides"], "sharing": "all"}}
    return write_recipe(folder, recipe)


def read_weights(run: Path) -> dict[str, Tensor]:
    """All weights of a run's last checkpoint, as fp32."""
    reader = open_reader(latest(run))
    found = {name: torch.empty(reader.shape(name)) for name in reader.names if SEPARATOR not in name}
    for name, tensor in found.items():
        read_weight(reader, name, tensor)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Losses and run of one process, which tests/offload/test_executor.py holds to plain training."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def run(bytes_per_parameter: int) -> tuple[dict[int, float], Path]:
        out = folder / str(bytes_per_parameter)
        return run_steps(recipe_file(out, bytes_per_parameter), str(out), (1, 1, 1), 1, None)[1], out

    return run


@pytest.mark.parametrize("axes", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 1, 4)])
def test_streamed_on_ranks_equals_one_process(
    axes: Axes, alone: Alone, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fleet: Fleet = request.getfixturevalue({2: "two", 4: "four"}[math.prod(axes)])
    (losses, run), recipe = alone(16), recipe_file(tmp_path, 16)
    assert fleet.run(run_steps, recipe, str(tmp_path), axes, 1, None)[0][1] == pytest.approx(losses, rel=1e-5)
    last = read_weights(run)
    for name, tensor in read_weights(tmp_path).items():
        torch.testing.assert_close(tensor, last[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("bytes_per_parameter", [4, 2, 1])
def test_fewer_bytes_on_ranks(bytes_per_parameter: int, alone: Alone, tmp_path: Path, four: Fleet) -> None:
    """Roundings turn over where sums have another order: losses agree to a thousandth."""
    (losses, run), recipe = alone(bytes_per_parameter), recipe_file(tmp_path, bytes_per_parameter)
    _, found = four.run(run_steps, recipe, str(tmp_path), (1, 2, 2), 1, None)[0]
    assert found == pytest.approx(losses, rel=2e-3)
    last = read_weights(run)
    for name, tensor in read_weights(tmp_path).items():
        if tensor.ndim > 1:
            assert (tensor - last[name]).norm() <= 0.03 * last[name].norm(), name


FROZEN = ["text", "backbone.layers.0", "backbone.layers.1.attention.qkv", "backbone.layers.1.mlp.experts.down"]


def has_images(records: list[tuple[int, int, int]]) -> bool:
    return any(component == 0 for component, _, _ in records)


@pytest.mark.parametrize("freeze", [FROZEN, ["text", "backbone", "numbers", "audio"]], ids=["parts", "all but images"])
def test_frozen_weights_on_ranks_stay_and_the_rest_is_as_in_one_process(
    freeze: list[str], alone: Alone, tmp_path: Path, two: Fleet
) -> None:
    """A rank without images, which alone are trained, gathers weights for the backward pass of the other one."""
    start = alone(16)[1]
    recipe = yaml.safe_load(Path(recipe_file(tmp_path, 16, steps=2)).read_text())
    images, *_, numbers = recipe["mixture"]
    recipe |= {"model": {"start": str(start), "freeze": freeze}, "modalities": {}}
    file = write_recipe(tmp_path, recipe | {"mixture": [{**images, "weight": 0.03}, numbers]})
    _, losses = run_steps(file, str(tmp_path / "one"), (1, 1, 1), 1, None)
    (first, found), (second, _) = two.run(run_steps, file, str(tmp_path / "two"), (1, 2, 1), 1, None)
    assert found == pytest.approx(losses, rel=1e-5)
    assert any(has_images(first[step]) != has_images(second[step]) for step in first)
    before, one, last = (read_weights(run) for run in (start, tmp_path / "one", tmp_path / "two"))
    for name, tensor in last.items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=2e-4, msg=name)
        if name.startswith(("adapters.text", *freeze)):
            assert torch.equal(tensor, before[name]), name
        elif tensor.ndim > 1 and name.startswith(("backbone", "adapters.image_in")):
            assert not torch.equal(tensor, before[name]), name


def test_ranks_change_from_pseudo_to_real(tmp_path: Path, two: Fleet, four: Fleet) -> None:
    stages = {"switch": {"step": SWITCH}, "warmup_steps": 1, "noise": 0.05}
    recipe = recipe_file(tmp_path, 2, steps=STEPS, save_every=2, keep_last=9, stages=stages)
    records: Records = {}
    losses: dict[int, float] = {}
    plan: list[tuple[Fleet | None, Axes, int, int | None]] = [
        (four, (1, 2, 2), 1, SWITCH + 1),  # falls right after the switch, with the last pseudo checkpoint written
        (two, (1, 1, 2), SWITCH + 1, 6),
        (None, (1, 1, 1), 5, None),
    ]
    for fleet, axes, begin, fall_at in plan:
        words: tuple[Any, ...] = (recipe, str(tmp_path / "run"), axes, begin, fall_at)
        answers = [run_steps(*words)] if fleet is None else fleet.run(run_steps, *words)
        records |= together([seen for seen, _ in answers])
        losses |= answers[0][1]
        wait_for(tmp_path / "run", {1: SWITCH, SWITCH + 1: 4, 5: STEPS}[begin])
    expected, expected_losses = run_steps(recipe, str(tmp_path / "whole"), (1, 1, 1), 1, None)
    assert records == expected
    assert losses == pytest.approx(expected_losses, rel=2e-3)
    ours, theirs = (read_weights(tmp_path / name) for name in ("run", "whole"))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 0.03 * tensor.norm() + 1e-6, name


def gathers(recipe: str, folder: str) -> tuple[int, int]:
    """All-gathers and reduce-scatters of one step."""
    checked, _ = read_recipe(Path(recipe), ["parallel.dp_shard=2", "parallel.ep=1"])
    training = MultimodalTraining(checked, RunFolder.open(folder), CPU, DistributedContext(CPU, 60))
    train_step = OffloadedTrainStep(training, checked.loop)
    counts = [0, 0]
    originals = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def gather(*values: Any, **named: Any) -> Any:
        counts[0] += 1
        return originals[0](*values, **named)

    def scatter(*values: Any, **named: Any) -> Any:
        counts[1] += 1
        return originals[1](*values, **named)

    dist.all_gather_into_tensor, dist.reduce_scatter_tensor = gather, scatter
    try:
        train_step.update(next(training.batches()), 1, 10)
    finally:
        dist.all_gather_into_tensor, dist.reduce_scatter_tensor = originals
    return counts[0], counts[1]


def test_a_shared_set_is_exchanged_once(tmp_path: Path, two: Fleet) -> None:
    shared = recipe_file(tmp_path / "a", 2, stages={"switch": {"step": 5}})
    own = recipe_file(tmp_path / "b", 2)
    # Two layers: forwards, and back again but for the last one, which is still there.
    assert two.run(gathers, shared, str(tmp_path / "run-a")) == [(1, 1)] * 2
    assert two.run(gathers, own, str(tmp_path / "run-b")) == [(3, 2)] * 2
