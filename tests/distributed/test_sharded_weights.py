"""Parts of weight sets on several ranks: gathered, summed and moved as the whole would be."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from openm6 import kernels
from openm6.distributed.config import MeshShape
from openm6.distributed.process_group import LayerWeights
from openm6.distributed.processes import DistributedContext
from openm6.offload.weight_store import RecordLayout
from openm6.optim import rules
from openm6.optim.config import PRECISION_OF_BYTES, OptimizerConfig
from openm6.optim.rules import UpdateArgs, update_rule
from openm6.optim.sharding import REPLICATED, ShardSpec
from tests.distributed.fleet import Fleet
from tests.distributed.test_process_group import CPU
from tests.triton_interpreter import need_interpreter

SHAPES = {"qkv": (7, 64), "narrow": (3, 128), "mlp.experts.up": (4, 8, 64)}


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sets_of(axes: tuple[int, int, int]) -> LayerWeights:
    ranks = DistributedContext(CPU, 60)
    ranks.open_mesh(MeshShape(*axes))
    return ranks.layer_weights([SHAPES])


def there_and_back(axes: tuple[int, int, int]) -> list[bool]:
    """Whether gathering gives the whole, and reducing the sum of all ranks' gradients, cut."""
    sets, whole = sets_of(axes), values(1)
    parts = {name: sets.part(0, name, tensor) for name, tensor in whole.items()}
    assert {name: tuple(part.shape) for name, part in parts.items()} == sets.local_shapes(0)
    found = sets.gather(0, {name: part for name, part in parts.items() if sets.is_sharded(0, name)})
    first = sets.shard_spec(0, "mlp.experts.up").first
    experts = whole["mlp.experts.up"][first : first + 4 // axes[2]]
    expected = {**whole, "mlp.experts.up": experts}
    same = [torch.equal(tensor, expected[name]) for name, tensor in found.items()]
    summed = sets.reduce(0, {name: tensor.clone() for name, tensor in expected.items()})
    for name, part in summed.items():
        # An expert's gradient already holds the rows of all ranks among which experts are dealt out.
        times = axes[0] * axes[1] * (1 if name == "mlp.experts.up" else axes[2])
        same.append(torch.allclose(part, times * parts[name]))
    some = sets.reduce(0, {"narrow": whole["narrow"].clone()})  # the others are frozen
    return [*same, list(some) == ["narrow"] and torch.equal(some["narrow"], summed["narrow"])]


@pytest.mark.parametrize("axes", [(1, 4, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2), (1, 1, 4)])
def test_parts_are_gathered_and_sums_are_cut(axes: tuple[int, int, int], four: Fleet) -> None:
    for same in four.run(there_and_back, axes):
        assert len(same) >= 6 and all(same)


def moved(axes: tuple[int, int, int] | None, bytes_per_parameter: int, in_triton: bool) -> dict[str, Tensor]:
    """The weights after three updates, of the whole or of this rank's parts."""
    sets = LayerWeights([SHAPES]) if axes is None else sets_of(axes)
    rule = update_rule(OptimizerConfig(precision=PRECISION_OF_BYTES[bytes_per_parameter]))
    layout = RecordLayout(sets.local_shapes(0), rule)
    views = layout.views(torch.zeros(layout.num_bytes, dtype=torch.uint8))
    for name, stored in views.items():
        rule.fill(stored, sets.part(0, name, values(1)[name]), 5, sets.shard_spec(0, name))
    for step in range(3):
        gradients = values(2 + step)
        gradients["mlp.experts.up"][2] = 0.0  # an expert without a token
        for name, stored in views.items():
            args = UpdateArgs(0.05, 0.1, 11 + step, torch.tensor(True), sets.shard_spec(0, name))
            with mock.patch.object(kernels, "available", lambda device: in_triton):
                rule.update(stored, sets.part(0, name, gradients[name]), args)
    return {name: rule.read(stored, torch.float32).clone() for name, stored in views.items()}


def moved_parts(axes: tuple[int, int, int], bytes_per_parameter: int, in_triton: bool) -> dict[str, float]:
    """The share of this rank's weights that are what they are in the whole."""
    parts, whole = (moved(one, bytes_per_parameter, in_triton) for one in (axes, None))
    sets = sets_of(axes)
    return {
        name: float(torch.isclose(part, sets.part(0, name, whole[name]), rtol=1e-5).float().mean())
        for name, part in parts.items()
        if part.numel()
    }


@pytest.mark.parametrize(
    ("bytes_per_parameter", "in_triton"),
    [(16, False), (4, False), (2, False), (1, False), (2, True), (1, True)],
)
def test_rules_move_parts_as_they_move_the_whole(bytes_per_parameter: int, in_triton: bool, four: Fleet) -> None:
    """Sums in another order may turn a rounding over, here and there."""
    if in_triton:
        need_interpreter()
    for axes in ((1, 4, 1), (1, 2, 2)):
        for shares in four.run(moved_parts, axes, bytes_per_parameter, in_triton):
            assert all(share > 0.98 for share in shares.values()), shares


def moved_unevenly(rows: int, bytes_per_parameter: int, at_once: int) -> tuple[int, bool]:
    """How often six matrices whose rows are cut unevenly ask the other rank, and whether they move as if whole."""
    spec = ShardSpec(1, rows, dist.group.WORLD)
    rule = update_rule(OptimizerConfig(precision=PRECISION_OF_BYTES[bytes_per_parameter]))
    generator = torch.Generator().manual_seed(3)
    values, gradient = (torch.randn(6, rows, 16, generator=generator) for _ in range(2))
    rank, read = dist.get_rank(), []
    with (
        mock.patch.object(rules, "AT_ONCE", at_once),
        mock.patch.object(kernels, "available", lambda device: False),
        mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as all_reduce,
    ):
        for one in (spec, REPLICATED):
            own, slope = (x if one is REPLICATED else x.split(one.lengths, 1)[rank] for x in (values, gradient))
            stored = {slot.name: torch.zeros(slot.shape, dtype=slot.dtype) for slot in rule.slots(tuple(own.shape))}
            rule.fill(stored, own, 5, one)
            rule.update(stored, slope, UpdateArgs(0.05, 0.1, 11, torch.tensor(True), one))
            read.append(rule.read(stored, torch.float32))
    expected = read[1].split(spec.lengths, 1)[rank]
    same = torch.isclose(read[0], expected, rtol=1e-5).float().mean() if read[0].numel() else 1.0
    return all_reduce.call_count, float(same) > 0.99


@pytest.mark.parametrize("bytes_per_parameter", [4, 2, 1])
@pytest.mark.parametrize("rows", [5, 3, 1], ids=["3 and 2", "2 and 1", "1 and none"])
def test_ranks_with_unlike_rows_ask_equally_often(rows: int, bytes_per_parameter: int, two: Fleet) -> None:
    """By their own rows, 3 · 16 values at a time would be two matrices on one rank and one on the other."""
    found = two.run(moved_unevenly, rows, bytes_per_parameter, 48)
    assert found[0][0] == found[1][0] > 0
    assert all(same for _, same in found)
