"""What a step says to other ranks: one all-to-all each way a layer, and the host waits for row counts alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openm6.distributed.config import MeshShape
from openm6.distributed.processes import DistributedContext
from openm6.nn.config import ExpertsConfig
from tests.distributed.fleet import Fleet
from tests.distributed.test_process_group import CPU
from tests.distributed.test_twenty_steps import MESHES, Axes, SharedWords
from tests.train.words_training import words_backbone

WAITS = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class Exchanges(TorchDispatchMode):
    """Counts all-to-alls, of rows and of numbers of rows, and while `inside` what the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.inside = False

    def enter(self, *_: Any) -> None:
        self.inside = True
        watch(self.waits)

    def leave(self, *_: Any) -> None:
        self.inside = False
        unwatch()

    def __torch_dispatch__(self, function: Any, types: Any, values: Any = (), named: Any = None) -> Any:
        name = str(function)
        if "alltoall" in name:
            self.calls["rows" if values[0].is_floating_point() else "counts"] += 1
        if self.inside and ("_local_scalar_dense" in name or "nonzero" in name):
            self.waits[name] += 1
        return function(*values, **(named or {}))


def one_step(axes: Axes, capacity: float | None, parts: int) -> tuple[dict[str, int], int]:
    """All-to-alls of a forward and a backward pass, and how often the layers read a tensor on the host."""
    experts = ExpertsConfig(intermediate_size=32, num_experts=8, top_k=2, num_shared=1, capacity_factor=capacity)
    training = SharedWords(words_backbone(experts=experts, moe_layer_freq=1))
    training.ranks = DistributedContext(CPU, 60)
    training.ranks.shard(training.model, MeshShape(*axes))
    training.words.backbone.executor.dispatcher = training.ranks.token_dispatcher(parts)
    batch, exchanges = training.batch(1), Exchanges()
    for block in training.words.backbone.blocks:
        block.mlp.register_forward_pre_hook(exchanges.enter)
        block.mlp.register_forward_hook(exchanges.leave)
    with exchanges:
        training.loss(batch).loss.backward()
    dist.barrier()
    return dict(exchanges.calls), sum(exchanges.waits.values())


ORIGINALS: dict[str, Any] = {}


def watch(waits: Counter[str]) -> None:
    """From here on every reading of a tensor by the host is counted."""
    for name in WAITS:
        ORIGINALS[name] = getattr(Tensor, name)

        def counting(self: Tensor, *values: Any, name: str = name) -> Any:
            waits[name] += 1
            return ORIGINALS[name](self, *values)

        setattr(Tensor, name, counting)


def unwatch() -> None:
    for name, original in ORIGINALS.items():
        setattr(Tensor, name, original)


@pytest.mark.parametrize("axes", MESHES)
def test_one_all_to_all_each_way_for_each_layer(axes: Axes, request: pytest.FixtureRequest) -> None:
    """Four layers with experts: rows there and answers home, forwards and backwards; numbers of rows once."""
    fleet: Fleet = request.getfixturevalue({2: "two", 4: "four"}[math.prod(axes)])
    dealt = axes[2] > 1
    for calls, waits in fleet.run(one_step, axes, None, 1):
        assert calls.get("rows", 0) == (4 * 4 if dealt else 0)
        assert calls.get("counts", 0) == (4 if dealt else 0)
        assert waits == (4 if dealt else 0)  # one reading of the splits a layer


def test_with_a_capacity_the_host_waits_for_nothing(two: Fleet) -> None:
    for calls, waits in two.run(one_step, (1, 1, 2), 1.5, 1):
        assert calls == {"rows": 4 * 4} and waits == 0


def test_parts_travel_one_by_one(two: Fleet) -> None:
    for calls, waits in two.run(one_step, (1, 1, 2), None, 2):
        assert calls["rows"] == 2 * 4 * 4 and calls["counts"] == 4 and waits == 4


def test_a_reading_is_noticed() -> None:
    waits: Counter[str] = Counter()
    watch(waits)
    try:
        torch.ones(2).tolist()
        assert torch.ones(1)
    finally:
        unwatch()
    assert waits == {"tolist": 1, "__bool__": 1}
