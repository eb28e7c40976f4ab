"""The loss without all logits against the plain one: values, gradients, chunks that do not divide, memory."""

from __future__ import annotations

import pytest
import torch

from openm6.ops.linear_loss import linear_nats, linear_nats_reference
from openm6.ops.product import ROWS


def inputs(tokens: int = 13) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    return hidden, weight, torch.randint(0, 20, (tokens,)), torch.rand(tokens)


@pytest.mark.parametrize(("tokens", "chunks"), [(13, 4), (3, 4), (1, 1), (8, 2)])
def test_it_equals_the_plain_loss(tokens, chunks):
    hidden, weight, label, token_weight = inputs(tokens)
    total, nats = linear_nats(hidden, weight, label, token_weight, most=20 * -(-tokens // chunks))
    plain, plain_nats = linear_nats_reference(hidden, weight, label, token_weight)
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(nats, plain_nats)
    ours = torch.autograd.grad(0.3 * total, (hidden, weight))
    theirs = torch.autograd.grad(0.3 * plain, (hidden, weight))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_nats_alone_need_no_gradient():
    hidden, weight, label, token_weight = inputs()
    with torch.no_grad():
        total, nats = linear_nats(hidden, weight, label, token_weight)
    torch.testing.assert_close(total, (nats * token_weight).sum())
    assert not linear_nats(hidden, weight, label, token_weight)[1].requires_grad


def test_under_autocast_the_head_works_in_half_and_learns_in_full():
    hidden, weight, label, token_weight = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = linear_nats(hidden, weight, label, token_weight)
    plain, _ = linear_nats_reference(hidden, weight, label, token_weight)
    torch.testing.assert_close(total, plain, rtol=0.02, atol=0.02)
    total.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_no_tensor_of_all_logits_is_made():
    """The largest tensor that any operation returns is a chunk's."""
    hidden, weight, label, token_weight = inputs(ROWS)  # none is filled up
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        linear_nats(hidden, weight, label, token_weight, most=4 * 20)[0].backward()
    assert max(largest) == max(20 * 8, ROWS * 8)
