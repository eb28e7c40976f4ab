"""Sums over ranks, and training as copies: several processes end where one does."""

from __future__ import annotations

import math
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from openm6.checkpoint.sharded import ShardedSaver
from openm6.core.run_folder import RunFolder
from openm6.distributed.config import MeshShape
from openm6.distributed.fsdp import refill_unit, shard_unit, with_offsets
from openm6.distributed.process_group import ProcessGroupContext
from openm6.distributed.processes import DistributedContext
from openm6.modalities.batch import Batch
from openm6.train.multimodal import MultimodalTraining
from openm6.train.run import read_recipe
from openm6.train.step import StepReport, TrainStep
from tests.distributed.fleet import Fleet
from tests.train.tiny_recipe import MODEL, tiny_recipe, write_recipe

CPU = torch.device("cpu")


def plain_exchanges() -> tuple[list[float], list[int], str, float]:
    ranks = DistributedContext(CPU, 60)
    total = ranks.all_reduce([ranks.rank, 2.5])
    summed = ranks.all_reduce_tensor(torch.tensor([float(ranks.rank + 1)]))
    return total, ranks.gather(ranks.rank), ranks.broadcast_object(f"rank {ranks.rank}"), float(summed)


def test_what_ranks_tell_one_another(four: Fleet) -> None:
    assert four.run(plain_exchanges) == [([6.0, 10.0], [0, 1, 2, 3], "rank 0", 10.0)] * 4


def test_one_process_needs_nobody() -> None:
    ranks = ProcessGroupContext()
    assert ranks.all_reduce([2, 3]) == [2, 3] and ranks.gather("x") == ["x"] and ranks.is_main_process


def timeouts() -> set[timedelta]:
    """Of all groups that a sharded run opens."""
    ranks = DistributedContext(CPU, 45.0)  # a busy machine connects slowly
    ranks.open_mesh(MeshShape(1, 2, 2))
    assert ranks.layout is not None
    found: list[ProcessGroup] = [*ranks.layout.mesh.get_all_groups(), ranks.layout.dense.get_group()]
    found.append(ShardedSaver(ranks.layout).group)
    return {group._get_backend(CPU).options._timeout for group in found}


def test_every_group_waits_as_long_as_the_recipe_has_it(four: Fleet) -> None:
    assert four.run(timeouts) == [{timedelta(seconds=45)}] * 4


def refilled() -> dict[str, bool]:
    """Which parameters of a sharded module require a gradient once it was built again."""
    ranks = DistributedContext(CPU, 60)
    ranks.open_mesh(MeshShape(1, 2, 1))
    assert ranks.layout is not None
    old, fresh = nn.Linear(4, 4), nn.Linear(4, 4)
    old.weight.requires_grad_(False)
    shard_unit(old, ranks.layout)
    refill_unit(ranks.layout, fresh, old)
    return {name: weight.requires_grad for name, weight in fresh.named_parameters()}


def test_frozen_weights_stay_frozen_when_a_module_is_built_again(two: Fleet) -> None:
    assert two.run(refilled) == [{"weight": False, "bias": True}] * 2


def uneven_gradients() -> list[Tensor | None]:
    """Rank 0 uses the first two of three layers, the others the second alone; nobody uses the third."""
    ranks = DistributedContext(CPU, 60)
    torch.manual_seed(1)
    layers = [nn.Linear(3, 3) for _ in range(3)]
    x = torch.full((2, 3), float(ranks.rank + 1))
    (layers[1](layers[0](x)) if ranks.is_main_process else layers[1](x)).sum().backward()
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    ranks.sum_gradients(parameters)
    return [parameter.grad for parameter in parameters]


def test_a_rank_that_does_not_use_a_layer_takes_part(two: Fleet) -> None:
    first, second = two.run(uneven_gradients)
    assert [gradient is None for gradient in first] == [False] * 4 + [True] * 2
    for ours, theirs in zip(first[:4], second[:4], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first[3], torch.full((3,), 4.0))  # two rows on each of two ranks


def recipe_file(folder: Path, axes: tuple[int, int, int], **experts: Any) -> str:
    recipe = tiny_recipe(steps=20)
    recipe["packing"] = {"batch_size": 4, "seq_len": 160, "num_shards": 4}
    recipe["parallel"] = dict(zip(("dp_replicate", "dp_shard", "ep"), axes, strict=True))
    recipe["model"] = {**MODEL, "overrides": {**MODEL["overrides"], **experts}}
    return write_recipe(folder, recipe)


def few_steps(recipe: str, folder: str, steps: int) -> tuple[list[StepReport], dict[str, Tensor], list[Any]]:
    """Reports, the weights at the end, and the records of each step's rows on this rank."""
    checked, _ = read_recipe(Path(recipe), [])
    ranks = DistributedContext(CPU, 60) if torch.distributed.is_initialized() else ProcessGroupContext()
    training = MultimodalTraining(checked, RunFolder.open(folder), CPU, ranks)
    train_step = TrainStep(training, checked.loop)
    batches = training.batches()
    reports, seen = [], []
    for step in range(1, steps + 1):
        batch: Batch = next(batches)
        seen.append([(draw.component, draw.epoch, draw.index) for draw in batch.samples])
        reports.append(train_step.update(batch, step, 20))
    return reports, whole_weights(training), seen


def whole_weights(training: MultimodalTraining) -> dict[str, Tensor]:
    """The weights of the whole model, wherever their parts lie."""
    weights = {name: tensor.detach() for name, tensor in training.model.state_dict().items()}
    if training.ranks.layout is not None:
        weights = with_offsets(training.model, weights, training.ranks.layout)
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in weights.items()}


@cache
def alone_once() -> tuple[list[StepReport], dict[str, Tensor], list[Any]]:
    """The same steps in one process."""
    with TemporaryDirectory() as folder:
        return few_steps(recipe_file(Path(folder), (1, 1, 1)), folder, 4)


@pytest.mark.parametrize(
    "axes",
    [(2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 1, 4), (1, 4, 1)],
)
def test_every_mesh_equals_one_process(
    axes: tuple[int, int, int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe = recipe_file(tmp_path, axes)
    fleet: Fleet = request.getfixturevalue({2: "two", 4: "four"}[math.prod(axes)])
    alone, weights, records = alone_once()
    together = fleet.run(few_steps, recipe, str(tmp_path / "together"), 4)
    for _, theirs, _ in together[1:]:
        assert all(torch.equal(theirs[name], tensor) for name, tensor in together[0][1].items())
    for step, report in enumerate(alone):
        other: StepReport = together[0][0][step]
        assert other.loss == pytest.approx(report.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(report.grad_norm, rel=1e-4)
        assert other.tokens == report.tokens and other.expert_load_cv == pytest.approx(report.expert_load_cv, abs=1e-5)
        assert set(other.metrics) == set(report.metrics)
        for name, value in report.metrics.items():
            assert other.metrics[name] == pytest.approx(value, rel=1e-4), name
        # What the step's joules are attributed to.
        assert report.work["task"].keys() == other.work["task"].keys() and report.work.keys() == other.work.keys()
        for kind, shares in report.work.items():
            assert any(share.tokens for share in shares.values())
            for name, share in shares.items():
                assert other.work[kind][name].tokens == share.tokens
                assert other.work[kind][name].operations == pytest.approx(share.operations)
        assert [record for _, _, seen in together for record in seen[step]] == records[step]
    for name, tensor in weights.items():
        torch.testing.assert_close(together[0][1][name], tensor, rtol=1e-3, atol=2e-4, msg=name)
