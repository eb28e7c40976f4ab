"""Mixture of experts against references: choice, load, losses, permutation, the networks."""

from __future__ import annotations

import pytest
import torch

from openm6.ops import moe as ops
from openm6.ops.matmul import grouped_mm
from openm6.ops.moe import (
    TokenPermutation,
    balance_loss,
    capacity_permutation,
    choose_experts,
    dropless_permutation,
    permute,
    sum_rows_reference,
    tokens_per_expert,
    unpermute,
    z_loss,
)
from openm6.ops.pointwise import swiglu


def random_logits(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalize", [True, False])
def test_top_k_equals_a_loop(normalize):
    logits = random_logits(9, 6)
    gate, chosen, probability = choose_experts(logits, None, 2, False, normalize)
    for n in range(9):
        ranked = sorted(range(6), key=lambda e: -logits[n, e].item())[:2]
        assert chosen[n].tolist() == ranked
        softmax = logits[n].exp() / logits[n].exp().sum()
        expected = softmax[ranked] / (softmax[ranked].sum() if normalize else 1)
        torch.testing.assert_close(gate[n], expected)
    torch.testing.assert_close(probability.sum(-1), torch.ones(9))


def test_prototypes_choose_one_expert_each():
    logits = random_logits(9, 6)
    gate, chosen, probability = choose_experts(logits, None, 3, True, True)
    for n in range(9):
        for z in range(3):
            group = logits[n, 2 * z : 2 * z + 2]
            assert chosen[n, z] == 2 * z + int(group.argmax())
            torch.testing.assert_close(gate[n, z], group.softmax(-1).max())
    torch.testing.assert_close(probability.sum(-1), torch.full((9,), 3.0))


@pytest.mark.parametrize("prototypes", [False, True])
def test_bias_moves_the_choice_and_not_the_gates(prototypes):
    logits = random_logits(20, 4)
    bias = torch.tensor([9.0, 0.0, 0.0, 9.0])
    gate, chosen, probability = choose_experts(logits, bias, 2, prototypes, False)
    assert {tuple(sorted(row)) for row in chosen.tolist()} == {(0, 3)}
    torch.testing.assert_close(gate, probability.gather(-1, chosen))


def test_load_counts_valid_tokens_only():
    chosen = torch.tensor([[0, 2], [2, 1], [2, 0]])
    assert tokens_per_expert(chosen, torch.tensor([True, True, False]), 4).tolist() == [1, 1, 2, 0]


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
    torch.testing.assert_close(balance_loss(probability, load, valid), balance_loss(probability[:4], load, all_valid))


def test_z_loss_per_prototype():
    logits = random_logits(5, 4)
    halves = [logits[:, :2].logsumexp(-1), logits[:, 2:].logsumexp(-1)]
    expected = torch.stack(halves).square().mean()
    torch.testing.assert_close(z_loss(logits, torch.ones(5, dtype=torch.bool), 2), expected)


def chosen_of(tokens: int, experts: int, choices: int, seed: int) -> torch.Tensor:
    return random_logits(tokens, experts, seed).topk(choices).indices


def naive_combine(x: torch.Tensor, gate: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Rows sent and combined untouched: each token times the sum of its kept gates."""
    return x * (gate * kept).sum(-1, keepdim=True)


def check_there_and_back(plan: TokenPermutation, chosen: torch.Tensor, seed: int) -> None:
    """Sending, scaling each row by its expert's number + 1, and combining, with all gradients."""
    torch.manual_seed(seed)
    tokens = chosen.shape[0]
    x = torch.randn(tokens, 5, requires_grad=True)
    gate = torch.rand(chosen.shape, requires_grad=True)
    upstream = torch.randn(tokens, 5)
    owner = torch.repeat_interleave(torch.arange(len(plan.counts)), plan.counts)
    y = unpermute(permute(x, plan) * (owner + 1).unsqueeze(-1), gate, plan)
    kept = torch.ones(chosen.shape) if plan.kept is None else plan.kept
    expected = naive_combine(x, gate * (chosen + 1), kept)
    torch.testing.assert_close(y, expected)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, gate), upstream),
        torch.autograd.grad(expected, (x, gate), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_dropless_rows_go_there_and_back(choices):
    chosen = chosen_of(11, 4, choices, choices)
    plan = dropless_permutation(chosen, 4)
    assert plan.counts.tolist() == torch.bincount(chosen.flatten(), minlength=4).tolist()
    check_there_and_back(plan, chosen, choices)


@pytest.mark.parametrize("capacity", [1, 3, 50])
def test_capacity_keeps_the_first_and_drops_the_rest(capacity):
    chosen = chosen_of(17, 4, 2, 7)
    valid = torch.ones(17, dtype=torch.bool)
    valid[3:6] = False
    plan = capacity_permutation(chosen, valid, 4, capacity)
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
    plan = dropless_permutation(torch.zeros(100, 1, dtype=torch.int64), 2)
    assert plan.source.tolist() == list(range(100))


def test_summed_rows_paths_agree():
    torch.manual_seed(0)
    rows, weight, slot = torch.randn(12, 8), torch.rand(6, 2), torch.randperm(12).view(6, 2)
    fast = sum_rows_reference(rows, slot, weight)
    torch.testing.assert_close(fast, sum_rows_reference(rows.double(), slot, weight.double()).float())


TOKENS, WIDTH, HIDDEN, EXPERTS = 11, 16, 8, 4


def inputs(choices: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    gate = torch.rand(TOKENS, choices, requires_grad=True)
    chosen = torch.randn(TOKENS, EXPERTS).topk(choices).indices
    up = torch.randn(EXPERTS, WIDTH, 2 * HIDDEN, requires_grad=True)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, requires_grad=True)
    return x, gate, chosen, up, down


def step_by_step(x, gate, chosen, up, down):
    plan = dropless_permutation(chosen, EXPERTS)
    hidden = swiglu(grouped_mm(permute(x, plan), up, plan.counts))
    return unpermute(grouped_mm(hidden, down, plan.counts), gate, plan)


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_the_fused_mlp_equals_its_steps(choices):
    x, gate, chosen, up, down = inputs(choices, choices)
    ours = ops.moe_mlp_fused(x, gate, chosen, up, down)
    theirs = step_by_step(x, gate, chosen, up, down)
    torch.testing.assert_close(ours, theirs)
    upstream, leaves = torch.randn_like(ours), (x, gate, up, down)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_all_tokens_may_go_to_one_expert():
    x, gate, _, up, down = inputs(1)
    chosen = torch.full((TOKENS, 1), 2)
    ours = ops.moe_mlp_fused(x, gate, chosen, up, down)
    torch.testing.assert_close(ours, step_by_step(x, gate, chosen, up, down))
    (d_up,) = torch.autograd.grad(ours, [up], torch.ones_like(ours))
    assert d_up[2].abs().sum() > 0
    assert d_up[[0, 1, 3]].abs().sum() == 0


def test_experts_without_tokens_have_no_gradient_whatever_the_kernel_leaves_there(monkeypatch):
    plain = torch.nn.functional.grouped_mm

    def leaving_garbage(a, b, offs):
        """As on a GPU that does not write what has no rows."""
        product = plain(a, b, offs=offs)
        idle = offs.diff(prepend=offs.new_zeros(1)) == 0
        return product + 7.0 * idle[:, None, None] if product.ndim == 3 else product

    monkeypatch.setattr(ops.F, "grouped_mm", leaving_garbage)
    x, gate, _, up, down = inputs(1)
    y = ops.moe_mlp_fused(x, gate, torch.full((TOKENS, 1), 2), up, down)
    for gradient in torch.autograd.grad(y, [up, down], torch.ones_like(y)):
        assert gradient[2].abs().sum() > 0
        assert gradient[[0, 1, 3]].abs().sum() == 0


def test_the_plan_is_that_of_the_sort():
    chosen = inputs(2)[2]
    choice, slot, ends = ops.sort_by_expert(chosen, EXPERTS)
    plan = dropless_permutation(chosen, EXPERTS)
    assert torch.equal(slot, plan.slot)
    assert torch.equal(choice // 2, plan.source)
    assert torch.equal(ends, plan.counts.cumsum(0).int())


def test_gated_swiglu_and_its_adjoint_equal_autograd():
    product = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 3, dtype=torch.float64)
    first, second = product.chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(first) * second * gate.unsqueeze(-1)
    torch.testing.assert_close(ops.swiglu_gate(product.detach(), gate.detach()), hidden.detach())
    theirs = torch.autograd.grad(hidden, (product, gate), upstream)
    ours = ops.swiglu_gate_backward(product.detach(), gate.detach(), upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_registered_operations_match_their_fakes():
    """Shapes and strides reported to the compiler equal the real ones; nothing is mutated."""
    x, gate, chosen, _, _ = (tensor.detach() for tensor in inputs(2))
    choice, slot, _ = ops.sort_by_expert(chosen, EXPERTS)
    product, row_gate = torch.randn(22, 2 * HIDDEN), gate.flatten()[choice]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.sort_by_expert, (chosen, EXPERTS), test_utils=checks)
    torch.library.opcheck(ops.gather_rows, (x, choice // 2), test_utils=checks)
    torch.library.opcheck(ops.sum_rows, (torch.randn(22, 5), slot), test_utils=checks)
    torch.library.opcheck(ops.swiglu_gate, (product, row_gate), test_utils=checks)
    torch.library.opcheck(ops.swiglu_gate_backward, (product, row_gate, torch.randn(22, HIDDEN)), test_utils=checks)


def test_it_is_one_graph_for_the_compiler():
    # The fake of the grouped product supports bf16 only.
    x, gate, chosen, up, down = (
        t.detach().bfloat16().requires_grad_() if t.is_floating_point() else t for t in inputs(2)
    )
    compiled = torch.compile(ops.moe_mlp_fused, backend="aot_eager", fullgraph=True)
    ours, theirs = compiled(x, gate, chosen, up, down), ops.moe_mlp_fused(x, gate, chosen, up, down)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, up), upstream),
        torch.autograd.grad(theirs, (x, up), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
