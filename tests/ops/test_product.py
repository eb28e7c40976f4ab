"""Products by either library against torch's own, and everything that pads its rows for them against its twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from openm6.ops import product as ops
from openm6.ops.cross_entropy import grouped_cross_entropy, grouped_cross_entropy_reference
from openm6.ops.expert_loop import sparse_network_by_expert
from openm6.ops.linear_loss import linear_nats, linear_nats_reference
from openm6.ops.sparse_network import sparse_network


@pytest.fixture(params=["oneDNN", "MKL"], autouse=True)
def library(request, monkeypatch):
    """Every product by the one library, then by the other, whatever this machine would choose."""
    if request.param == "oneDNN" and not ops.has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(ops, "onednn_is_faster", lambda: request.param == "oneDNN")
    monkeypatch.setattr(ops, "SMALLEST", 1)
    return request.param


def same_gradients(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, leaves, upstream)
    for one, other in zip(mine, torch.autograd.grad(theirs, leaves, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(32, 24), (2, 32, 24), (5, 24)])
def test_linear_equals_torchs(shape):
    x, weight = torch.randn(*shape, requires_grad=True), torch.randn(40, 24, requires_grad=True)
    same_gradients(ops.linear(x, weight), F.linear(x, weight), [x, weight])


def test_rows_that_do_not_come_back_stay_with_torch(library):
    weight = torch.randn(8, 24, requires_grad=True)

    def taken(rows: int) -> bool:
        return "_Linear" in type(ops.linear(torch.randn(rows, 24), weight).grad_fn).__name__

    assert taken(3 * ops.ROWS) == (library == "oneDNN")
    assert not taken(3 * ops.ROWS - 1)


def test_products_of_any_strides_and_into_what_is_there():
    x, weight, bias = torch.randn(24, 16).t(), torch.randn(24, 40).t(), torch.randn(40)
    torch.testing.assert_close(ops.product(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    gaps = torch.randn(40, 48)[:, ::2]
    torch.testing.assert_close(ops.product(x, gaps), F.linear(x, gaps), rtol=1e-5, atol=1e-5)
    assert not ops.pays(x, gaps)
    out = torch.zeros(16, 40)
    ops.product_into(out, x, weight)
    torch.testing.assert_close(out, x @ weight.t(), rtol=1e-5, atol=1e-5)
    ops.add_product(out, x, weight)
    torch.testing.assert_close(out, 2 * (x @ weight.t()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [11, 64])
@pytest.mark.parametrize("choices", [1, 3])
def test_expert_after_expert_equals_all_at_once(tokens, choices):
    width, hidden, experts = 16, 8, 4
    x = torch.randn(tokens, width, requires_grad=True)
    gate = torch.rand(tokens, choices, requires_grad=True)
    up = torch.randn(experts, width, 2 * hidden, requires_grad=True)
    down = torch.randn(experts, hidden, width, requires_grad=True)
    leaves = [x, gate, up, down]
    # The last expert is chosen by nobody in the first case, by everybody in the second.
    for scores in (torch.tensor([0.0, 0, 0, -99]), torch.tensor([0.0, 0, 0, 99])):
        chosen = (torch.randn(tokens, experts) + scores).topk(choices).indices
        ours = sparse_network_by_expert(x, gate, chosen, up, down)
        same_gradients(ours, sparse_network(x, gate, chosen, up, down), leaves)


def test_the_losses_take_no_notice_of_the_rows_that_fill_up():
    hidden, weight = torch.randn(13, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    label, token_weight = torch.randint(0, 20, (13,)), torch.rand(13)
    ours, nats = linear_nats(hidden, weight, label, token_weight)
    theirs, plain = linear_nats_reference(hidden, weight, label, token_weight)
    torch.testing.assert_close(nats, plain, rtol=1e-5, atol=1e-5)
    same_gradients(ours, theirs, [hidden, weight])
    states, heads = torch.randn(7, 3, 8, requires_grad=True), torch.randn(3, 8, 12, requires_grad=True)
    wanted = torch.randint(0, 12, (7, 3))
    ours = grouped_cross_entropy(states, heads, wanted, 0.1)
    same_gradients(ours, grouped_cross_entropy_reference(states, heads, wanted, 0.1), [states, heads])


def test_many_rows_come_to_few_lengths(library):
    lengths = {ops.filled_up(rows, torch.float32) for rows in range(1, 4 * 16 * ops.ROWS + 1)}
    if library == "MKL":
        assert len(lengths) == 4 * 16 * ops.ROWS
        assert ops.filled_up(7, torch.bfloat16) == ops.ROWS
        return
    assert len(lengths) == 16 + 2 * 8
    assert all(length % ops.ROWS == 0 for length in lengths)
    for rows in (0, 1, ops.ROWS, 600, 5000):
        assert rows <= ops.filled_up(rows, torch.float32) < max(1.13 * rows, rows + ops.ROWS)
