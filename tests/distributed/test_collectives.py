"""Collectives with gradients: experts on several ranks are those of one, and rows of all ranks meet in one loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from openm6.distributed.collectives import AllToAllDispatcher, CopiesDispatcher, open_gather
from openm6.distributed.fsdp import keep_experts
from openm6.modalities.pool import PoolAdapter, PoolConfig
from openm6.nn.config import ExpertsConfig
from openm6.nn.moe import MoE, TokenDispatcher
from tests.distributed.fleet import Fleet
from tests.nn.test_moe import WIDTH, make

NUM_EXPERTS = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 3},
    "prototypes": {"num_prototypes": 2, "hidden_act": "gelu"},
    "shared": {"top_k": 2, "num_shared": 1},
    "aux": {"top_k": 2, "balance": "aux", "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.0},
    "capacity": {"top_k": 2, "capacity_factor": 8.0},
}
PARTS = ((0, 3), (3, 4))  # pairs of each rank: unlike numbers


def build(variant: str) -> MoE:
    return make(ExpertsConfig(intermediate_size=24, num_experts=NUM_EXPERTS, **VARIANTS[variant]), seed=1)


def tokens_of(rank: int, variant: str) -> tuple[Tensor, Tensor]:
    """Ranks bring unlike numbers of tokens, unless a capacity asks for equal ones; those of rank 2 are alike."""
    generator = torch.Generator().manual_seed(rank)
    length = 6 if variant == "capacity" else 1 + 5 * rank
    x = torch.randn(1, length, WIDTH, generator=generator)
    if rank == 2:
        x = x[:, :1].expand_as(x)  # all to the same experts: most ranks get nothing from here
    return x.clone(), torch.ones(1, length, dtype=torch.bool)


def learn(moe: MoE, dispatcher: Any, variant: str, rank: int) -> list[Tensor]:
    x, valid = tokens_of(rank, variant)
    x.requires_grad_()
    y, load = moe(x, valid, dispatcher, 0)
    everyone = sum(tokens_of(other, variant)[0].shape[1] for other in range(4))
    ((y * y).sum() + load.side_loss * valid.sum() / everyone).backward()
    return [y.detach(), x.grad]


def one_rank(variant: str, chunks: int) -> tuple[list[Tensor], list[Tensor | None]]:
    moe = build(variant)
    rank, size = dist.get_rank(), dist.get_world_size()
    keep_experts([moe.experts], rank, size)
    found = learn(moe, AllToAllDispatcher(dist.group.WORLD, chunks), variant, rank)
    return found, [moe.experts.up.grad, moe.experts.down.grad, *other_gradients(moe)]


def other_gradients(moe: MoE) -> list[Tensor | None]:
    """Those of what every rank has: the router and the shared experts."""
    shared = [] if moe.shared_experts is None else [*moe.shared_experts.parameters()]
    return [parameter.grad for parameter in (moe.router.weight, *shared)]


class Totals(TokenDispatcher):
    """Stands for all four ranks in one process."""

    def __init__(self, load: Tensor) -> None:
        self.load = load

    def all_reduce(self, load: Tensor) -> Tensor:
        return self.load


def whole_load(variant: str) -> Tensor:
    moe = build(variant)
    loads = [moe(x, valid, TokenDispatcher(), 0)[1].load for x, valid in
             (tokens_of(rank, variant) for rank in range(4))]  # fmt: skip
    return torch.stack(loads).sum(0)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dealt_out_equals_one_process(variant: str, chunks: int, four: Fleet) -> None:
    moe = build(variant)
    dispatcher = Totals(whole_load(variant))
    alone = [learn(moe, dispatcher, variant, rank) for rank in range(4)]
    answers = four.run(one_rank, variant, chunks)
    for (found, _), expected in zip(answers, alone, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for number, whole in enumerate((moe.experts.up.grad, moe.experts.down.grad)):
        joined = torch.cat([gradients[number] for _, gradients in answers])
        torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-5)
    for number, whole in enumerate(other_gradients(moe), start=2):
        added = sum(gradients[number] for _, gradients in answers)
        torch.testing.assert_close(added, whole, rtol=1e-4, atol=1e-5)


def copies_total() -> Tensor:
    load = torch.tensor([1.0, float(dist.get_rank())])
    total = CopiesDispatcher().all_reduce(load)
    assert load[0] == 1.0  # the rank's own count is left as it was
    return total


def test_copies_sum_their_load(two: Fleet) -> None:
    assert all(torch.equal(total, torch.tensor([2.0, 1.0])) for total in two.run(copies_total))


def count_collectives() -> tuple[int, int]:
    """All-to-alls forwards and backwards of one layer."""
    calls: list[int] = []
    original = dist.all_to_all_single

    def counting(*values: Any, **named: Any) -> Any:
        calls.append(values[0].dim())
        return original(*values, **named)

    dist.all_to_all_single = counting
    try:
        moe = build("top_k")
        keep_experts([moe.experts], dist.get_rank(), dist.get_world_size())
        x, valid = tokens_of(dist.get_rank(), "top_k")
        x.requires_grad_()
        y, _ = moe(x, valid, AllToAllDispatcher(dist.group.WORLD), 0)
        forward = len(calls)
        y.sum().backward()
    finally:
        dist.all_to_all_single = original
    return forward - 1, len(calls) - forward  # one of the forward ones carries numbers of rows


def test_one_exchange_each_way(two: Fleet) -> None:
    assert two.run(count_collectives) == [(2, 2)] * 2  # rows there and answers home, and their gradients


def pool() -> PoolAdapter:
    torch.manual_seed(3)
    return PoolAdapter(8, PoolConfig(size=4))


def pairs() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states of four pairs, two of which say the same."""
    torch.manual_seed(4)
    key = torch.tensor([5, 6, 5, 7]).repeat_interleave(2)
    return torch.randn(8, 8), {"key": key, "space": torch.ones_like(key)}


def rank_loss() -> list[torch.Tensor]:
    """This rank's fraction of the loss, its gradients, and a turn in which only the first rank has pairs."""
    own = dist.get_rank()
    adapter, (hidden, arrays) = pool(), pairs()
    adapter.gather = open_gather()
    assert adapter.gather is not None
    rows = slice(2 * PARTS[own][0], 2 * PARTS[own][1])
    mine = hidden[rows].clone().requires_grad_(True)
    loss = adapter.nll(mine, {name: array[rows] for name, array in arrays.items()}).sum()
    loss.backward()
    weight = adapter.project.weight.grad
    dist.all_reduce(weight)
    both = adapter.none() if own else adapter.nll(hidden[:2], {n: a[:2] for n, a in arrays.items()}).sum()
    return [loss.detach(), mine.grad, weight, both.detach()]


def test_two_ranks_are_as_one(two: Fleet) -> None:
    found = two.run(rank_loss)
    adapter, (hidden, arrays) = pool(), pairs()
    hidden.requires_grad_(True)
    whole = adapter.nll(hidden, arrays).sum()
    whole.backward()
    assert float(found[0][0] + found[1][0]) == pytest.approx(float(whole), rel=1e-5)
    assert torch.allclose(torch.cat([found[0][1], found[1][1]]), hidden.grad, atol=1e-6)
    for _, _, weight, _ in found:
        assert torch.allclose(weight, adapter.project.weight.grad, atol=1e-6)
    assert float(found[1][3]) == 0.0


def test_alone_nothing_travels() -> None:
    assert open_gather() is None
