"""The sparse network as one step against its pieces, and the registered operations against torch's own checks."""

from __future__ import annotations

import pytest
import torch

from openm6.ops import sparse_network as ops
from openm6.ops.activation import swiglu
from openm6.ops.grouped import grouped_product
from openm6.ops.routing import combine_rows, plan_dropless, send_rows

TOKENS, WIDTH, HIDDEN, EXPERTS = 11, 16, 8, 4


def inputs(choices: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    gate = torch.rand(TOKENS, choices, requires_grad=True)
    chosen = torch.randn(TOKENS, EXPERTS).topk(choices).indices
    up = torch.randn(EXPERTS, WIDTH, 2 * HIDDEN, requires_grad=True)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, requires_grad=True)
    return x, gate, chosen, up, down


def piece_by_piece(x, gate, chosen, up, down):
    plan = plan_dropless(chosen, EXPERTS)
    hidden = swiglu(grouped_product(send_rows(x, plan), up, plan.counts))
    return combine_rows(grouped_product(hidden, down, plan.counts), gate, plan)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("choices", [1, 2, 3])
def test_one_step_equals_the_pieces(choices, keep):
    x, gate, chosen, up, down = inputs(choices, choices)
    ours = ops.sparse_network(x, gate, chosen, up, down, keep)
    theirs = piece_by_piece(x, gate, chosen, up, down)
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
    ours = ops.sparse_network(x, gate, chosen, up, down)
    torch.testing.assert_close(ours, piece_by_piece(x, gate, chosen, up, down))
    (d_up,) = torch.autograd.grad(ours, [up], torch.ones_like(ours))
    assert d_up[2].abs().sum() > 0
    assert d_up[[0, 1, 3]].abs().sum() == 0


def test_experts_without_tokens_have_no_gradient_whatever_the_kernel_leaves_there(monkeypatch):
    plain = torch.nn.functional.grouped_mm

    def leaving_garbage(a, b, offs):
        """As on a GPU that does not write what has no rows."""
        product = plain(a, b, offs=offs)
        return (
            product + torch.where(offs.diff(prepend=offs.new_zeros(1)) == 0, 7.0, 0.0)[:, None, None]
            if (product.ndim == 3)
            else product
        )

    monkeypatch.setattr(ops.F, "grouped_mm", leaving_garbage)
    x, gate, _, up, down = inputs(1)
    y = ops.sparse_network(x, gate, torch.full((TOKENS, 1), 2), up, down)
    for gradient in torch.autograd.grad(y, [up, down], torch.ones_like(y)):
        assert gradient[2].abs().sum() > 0
        assert gradient[[0, 1, 3]].abs().sum() == 0


def test_the_plan_is_that_of_the_sort():
    chosen = inputs(2)[2]
    choice, slot, ends = ops.plan_rows(chosen, EXPERTS)
    plan = plan_dropless(chosen, EXPERTS)
    assert torch.equal(slot, plan.slot)
    assert torch.equal(choice // 2, plan.source)
    assert torch.equal(ends, plan.counts.cumsum(0).int())


def test_the_adjoint_of_the_gated_activation_by_differences():
    product = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 3, dtype=torch.float64)
    theirs = torch.autograd.grad(ops.swiglu_gate_reference(product, gate), (product, gate), upstream)
    ours = ops.swiglu_gate_backward(product.detach(), gate.detach(), upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_registered_operations_keep_their_word():
    """Shapes and strides told to the compiler equal the real ones; nothing is changed in secret."""
    x, gate, chosen, _, _ = (tensor.detach() for tensor in inputs(2))
    choice, slot, _ = ops.plan_rows(chosen, EXPERTS)
    product, row_gate = torch.randn(22, 2 * HIDDEN), gate.flatten()[choice]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.plan_rows, (chosen, EXPERTS), test_utils=checks)
    torch.library.opcheck(ops.gather_rows, (x, choice // 2), test_utils=checks)
    torch.library.opcheck(ops.sum_rows, (torch.randn(22, 5), slot), test_utils=checks)
    torch.library.opcheck(ops.swiglu_gate, (product, row_gate), test_utils=checks)
    torch.library.opcheck(
        ops.swiglu_gate_backward, (product, row_gate, torch.randn(22, HIDDEN)), test_utils=checks
    )


def test_it_is_one_graph_for_the_compiler():
    # The compiler's stand-in for the grouped product knows bf16 alone.
    x, gate, chosen, up, down = (
        t.detach().bfloat16().requires_grad_() if t.is_floating_point() else t for t in inputs(2)
    )
    compiled = torch.compile(ops.sparse_network, backend="aot_eager", fullgraph=True)
    ours, theirs = compiled(x, gate, chosen, up, down), ops.sparse_network(x, gate, chosen, up, down)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, up), upstream),
        torch.autograd.grad(theirs, (x, up), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
