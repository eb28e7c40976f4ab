"""Losses against their references."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.ops.losses import (
    grouped_cross_entropy,
    info_nce,
    linear_cross_entropy,
)
from openm6.ops.matmul import ROWS
from tests.ops.test_pointwise import plain


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, label: Tensor, token_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` with all logits at once."""
    nll = F.cross_entropy(F.linear(hidden, weight).float(), label, reduction="none")
    return (nll * token_weight).sum(), nll.detach()


def inputs(tokens: int = 13) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    return hidden, weight, torch.randint(0, 20, (tokens,)), torch.rand(tokens)


@pytest.mark.parametrize(("tokens", "chunks"), [(13, 4), (3, 4), (1, 1), (8, 2)])
def test_it_equals_the_plain_loss(tokens, chunks):
    hidden, weight, label, token_weight = inputs(tokens)
    total, nll = linear_cross_entropy(hidden, weight, label, token_weight, max_logits=20 * -(-tokens // chunks))
    plain, plain_nll = linear_cross_entropy_reference(hidden, weight, label, token_weight)
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(nll, plain_nll)
    ours = torch.autograd.grad(0.3 * total, (hidden, weight))
    theirs = torch.autograd.grad(0.3 * plain, (hidden, weight))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_has_no_gradient_and_the_other_the_same(frozen: str) -> None:
    hidden, weight, label, token_weight = inputs()
    plain, _ = linear_cross_entropy_reference(hidden, weight, label, token_weight)
    expected = torch.autograd.grad(plain, hidden if frozen == "weight" else weight)[0]
    fixed, learned = (weight, hidden) if frozen == "weight" else (hidden, weight)
    fixed.requires_grad_(False)
    linear_cross_entropy(hidden, weight, label, token_weight)[0].backward()
    assert fixed.grad is None and learned.grad is not None
    torch.testing.assert_close(learned.grad, expected)


def test_the_nll_alone_needs_no_gradient():
    hidden, weight, label, token_weight = inputs()
    with torch.no_grad():
        total, nll = linear_cross_entropy(hidden, weight, label, token_weight)
    torch.testing.assert_close(total, (nll * token_weight).sum())
    assert not linear_cross_entropy(hidden, weight, label, token_weight)[1].requires_grad


def test_without_gradients_none_of_a_head_is_computed() -> None:
    hidden, weight, label, token_weight = inputs(ROWS)
    operations, classifiers = Counter[str](), torch.randn(1, 8, 20, requires_grad=True)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        linear_cross_entropy(hidden.detach(), weight, label, token_weight)
        assert sum(n for name, n in operations.items() if any(word in name for word in ("mm", "linear"))) == 1
        operations.clear()
        grouped_cross_entropy(hidden.detach()[:, None], classifiers, label[:, None], 0.1)
    assert not any("scatter_add" in name for name in operations)


def test_under_autocast_the_head_is_in_half_and_its_gradient_in_full():
    hidden, weight, label, token_weight = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, weight, label, token_weight)
    plain, _ = linear_cross_entropy_reference(hidden, weight, label, token_weight)
    torch.testing.assert_close(total, plain, rtol=0.02, atol=0.02)
    total.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_no_tensor_of_all_logits_is_made():
    """The largest tensor that any operation returns is a chunk's."""
    hidden, weight, label, token_weight = inputs(ROWS)  # no padding
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, label, token_weight, max_logits=4 * 20)[0].backward()
    assert max(largest) == max(20 * 8, ROWS * 8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [(7, 4, 8, 30), (1, 1, 3, 2), (0, 2, 4, 5)])
def test_values_and_gradients_equal_the_reference(size: tuple[int, int, int, int], smoothing: float) -> None:
    positions, groups, width, classes = size
    torch.manual_seed(positions)
    states = torch.randn(positions, groups, width, requires_grad=True)
    weight = torch.randn(groups, width, classes, requires_grad=True)
    target = torch.randint(classes, (positions, groups))
    upstream = torch.randn(positions, groups)
    ours = grouped_cross_entropy(states, weight, target, smoothing)
    reference = plain(grouped_cross_entropy, states, weight, target, smoothing)
    torch.testing.assert_close(ours, reference)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (states, weight), upstream),
        torch.autograd.grad(reference, (states, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_sure_answer_stays_finite() -> None:
    states, weight = torch.tensor([[[1e4]]]), torch.tensor([[[1.0, -1.0]]])
    right = grouped_cross_entropy(states, weight, torch.tensor([[0]]), 0.0)
    wrong = grouped_cross_entropy(states, weight, torch.tensor([[1]]), 0.0)
    assert right.item() == 0.0 and wrong.item() == pytest.approx(2e4)


def naive(query: Tensor, gallery: Tensor, same: Tensor, partner: Tensor, scale: float) -> list[float]:
    """−log(e^own / Σ e^other), written out."""
    found = []
    for q, own in enumerate(partner.tolist()):
        scores = {
            g: math.exp(scale * float(query[q] @ gallery[g])) for g in range(len(gallery)) if g == own or not same[q, g]
        }
        found.append(-math.log(scores[own] / sum(scores.values())))
    return found


@pytest.mark.parametrize("shift", [0, 2])
def test_it_is_what_the_formula_says(shift: int) -> None:
    torch.manual_seed(shift)
    query, gallery = torch.randn(4, 8), torch.randn(6, 8)
    same = torch.rand(4, 6) < 0.3
    partner = torch.arange(4) + shift
    nll = info_nce(query, gallery, same, partner, 1.5)
    assert nll.tolist() == pytest.approx(naive(query, gallery, same, partner, 1.5), rel=1e-5)


def test_similarities_are_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    query, gallery = (F.normalize(torch.randn(6, 64), dim=-1) for _ in range(2))
    asked = (query, gallery, torch.zeros(6, 6, dtype=torch.bool), torch.arange(6), 100.0)
    expected = info_nce(*asked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(info_nce(*asked), expected)


def test_equal_records_are_no_negatives() -> None:
    query = torch.eye(2)
    equal = torch.ones(2, 2, dtype=torch.bool)
    assert info_nce(query, query, equal, torch.arange(2), 10.0).tolist() == [0.0, 0.0]


def test_no_pairs_give_no_losses() -> None:
    empty = torch.zeros(0, 4)
    nll = info_nce(empty, torch.eye(4), torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0).long(), 1.0)
    assert nll.shape == (0,)
