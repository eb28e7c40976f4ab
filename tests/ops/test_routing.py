"""Routing against naive twins: choices, loads, losses, and the journey of rows there and back."""

from __future__ import annotations

import pytest
import torch

from openm6.ops.routing import (
    RowPlan,
    balance_loss,
    balanced_bias,
    capacity_of,
    choose_prototypes,
    choose_top_k,
    combine_rows,
    expert_load,
    plan_capacity,
    plan_dropless,
    send_rows,
    variation,
    weighted_rows,
    z_loss,
)


def random_logits(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalise", [True, False])
def test_top_k_equals_a_loop(normalise):
    logits = random_logits(9, 6)
    gate, chosen, probability = choose_top_k(logits, None, 2, normalise)
    for n in range(9):
        ranked = sorted(range(6), key=lambda e: -logits[n, e].item())[:2]
        assert chosen[n].tolist() == ranked
        share = logits[n].exp() / logits[n].exp().sum()
        expected = share[ranked] / (share[ranked].sum() if normalise else 1)
        torch.testing.assert_close(gate[n], expected)
    torch.testing.assert_close(probability.sum(-1), torch.ones(9))


def test_prototypes_choose_one_expert_each():
    logits = random_logits(9, 6)
    gate, chosen, probability = choose_prototypes(logits, None, 3)
    for n in range(9):
        for z in range(3):
            group = logits[n, 2 * z : 2 * z + 2]
            assert chosen[n, z] == 2 * z + int(group.argmax())
            torch.testing.assert_close(gate[n, z], group.softmax(-1).max())
    torch.testing.assert_close(probability.sum(-1), torch.full((9,), 3.0))


@pytest.mark.parametrize("groups", [None, 2])
def test_bias_moves_the_choice_and_not_the_gates(groups):
    logits = random_logits(20, 4)
    bias = torch.tensor([9.0, 0.0, 0.0, 9.0])
    if groups:
        gate, chosen, probability = choose_prototypes(logits, bias, groups)
    else:
        gate, chosen, probability = choose_top_k(logits, bias, 2, False)
    assert {tuple(sorted(row)) for row in chosen.tolist()} == {(0, 3)}
    torch.testing.assert_close(gate, probability.gather(-1, chosen))


def test_load_counts_valid_tokens_only():
    chosen = torch.tensor([[0, 2], [2, 1], [2, 0]])
    assert expert_load(chosen, torch.tensor([True, True, False]), 4).tolist() == [1, 1, 2, 0]


def test_variation():
    assert variation(torch.full((5,), 7.0)) == 0
    torch.testing.assert_close(variation(torch.tensor([0.0, 0.0, 0.0, 4.0])), torch.tensor(3.0).sqrt())


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    valid = torch.ones(8, dtype=torch.bool)
    even = balance_loss(torch.full((8, 4), 0.25), torch.full((4,), 2.0), valid)
    torch.testing.assert_close(even, torch.tensor(1.0))
    one = torch.zeros(8, 4)
    one[:, 1] = 1
    torch.testing.assert_close(balance_loss(one, one.sum(0), valid), torch.tensor(4.0))


def test_losses_ignore_padding():
    logits = random_logits(6, 4)
    valid = torch.tensor([True] * 4 + [False] * 2)
    all_valid = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(z_loss(logits, valid), z_loss(logits[:4], all_valid))
    load = torch.tensor([1.0, 2.0, 1.0, 0.0])
    probability = logits.softmax(-1)
    torch.testing.assert_close(
        balance_loss(probability, load, valid), balance_loss(probability[:4], load, all_valid)
    )


def test_z_loss_per_prototype():
    logits = random_logits(5, 4)
    halves = [logits[:, :2].logsumexp(-1), logits[:, 2:].logsumexp(-1)]
    expected = torch.stack(halves).square().mean()
    torch.testing.assert_close(z_loss(logits, torch.ones(5, dtype=torch.bool), 2), expected)


def test_bias_rises_for_the_starved_and_falls_for_the_crowded():
    assert balanced_bias(torch.zeros(3), torch.tensor([2.0, 4.0, 6.0]), 0.5).tolist() == [0.5, 0.0, -0.5]


def test_capacity_is_rounded_up():
    assert capacity_of(10, 2, 4, 1.25) == 7
    assert capacity_of(1, 1, 100, 1.0) == 1


def chosen_of(tokens: int, experts: int, choices: int, seed: int) -> torch.Tensor:
    return random_logits(tokens, experts, seed).topk(choices).indices


def naive_combine(x: torch.Tensor, gate: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Rows sent and combined untouched: each token times the sum of its kept gates."""
    return x * (gate * kept).sum(-1, keepdim=True)


def check_there_and_back(plan: RowPlan, chosen: torch.Tensor, seed: int) -> None:
    """Sending, scaling each row by its expert's number + 1, and combining, with all gradients."""
    torch.manual_seed(seed)
    tokens = chosen.shape[0]
    x = torch.randn(tokens, 5, requires_grad=True)
    gate = torch.rand(chosen.shape, requires_grad=True)
    upstream = torch.randn(tokens, 5)
    owner = torch.repeat_interleave(torch.arange(len(plan.counts)), plan.counts)
    y = combine_rows(send_rows(x, plan) * (owner + 1).unsqueeze(-1), gate, plan)
    kept = torch.ones(chosen.shape) if plan.kept is None else plan.kept
    twin = naive_combine(x, gate * (chosen + 1), kept)
    torch.testing.assert_close(y, twin)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, gate), upstream),
        torch.autograd.grad(twin, (x, gate), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_dropless_rows_go_there_and_back(choices):
    chosen = chosen_of(11, 4, choices, choices)
    plan = plan_dropless(chosen, 4)
    assert plan.counts.tolist() == torch.bincount(chosen.flatten(), minlength=4).tolist()
    check_there_and_back(plan, chosen, choices)


@pytest.mark.parametrize("capacity", [1, 3, 50])
def test_capacity_keeps_the_first_and_drops_the_rest(capacity):
    chosen = chosen_of(17, 4, 2, 7)
    valid = torch.ones(17, dtype=torch.bool)
    valid[3:6] = False
    plan = plan_capacity(chosen, valid, 4, capacity)
    taken = [0] * 4
    for n in range(17):
        for k in range(2):
            expert = int(chosen[n, k])
            expected = bool(valid[n]) and taken[expert] < capacity
            taken[expert] += expected
            assert plan.kept is not None
            assert plan.kept[n, k].item() == expected
    assert plan.counts.tolist() == [capacity] * 4
    check_there_and_back(plan, chosen, capacity)


def test_rows_of_an_expert_keep_the_order_of_their_tokens():
    plan = plan_dropless(torch.zeros(100, 1, dtype=torch.int64), 2)
    assert plan.source.tolist() == list(range(100))


def test_weighted_rows_paths_agree():
    torch.manual_seed(0)
    rows, weight, slot = torch.randn(12, 8), torch.rand(6, 2), torch.randperm(12).view(6, 2)
    fast = weighted_rows(rows, weight, slot)
    torch.testing.assert_close(fast, weighted_rows(rows.double(), weight.double(), slot).float())
