"""The cross-entropy of several classifiers against its naive twin."""

from __future__ import annotations

import pytest
import torch

from openm6.ops.cross_entropy import grouped_cross_entropy, grouped_cross_entropy_reference


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [(7, 4, 8, 30), (1, 1, 3, 2), (0, 2, 4, 5)])
def test_values_and_gradients_equal_the_twin(size: tuple[int, int, int, int], smoothing: float) -> None:
    places, groups, width, classes = size
    torch.manual_seed(places)
    states = torch.randn(places, groups, width, requires_grad=True)
    weight = torch.randn(groups, width, classes, requires_grad=True)
    wanted = torch.randint(classes, (places, groups))
    upstream = torch.randn(places, groups)
    ours = grouped_cross_entropy(states, weight, wanted, smoothing)
    twin = grouped_cross_entropy_reference(states, weight, wanted, smoothing)
    torch.testing.assert_close(ours, twin)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (states, weight), upstream),
        torch.autograd.grad(twin, (states, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_sure_answer_stays_finite() -> None:
    states, weight = torch.tensor([[[1e4]]]), torch.tensor([[[1.0, -1.0]]])
    right = grouped_cross_entropy(states, weight, torch.tensor([[0]]), 0.0)
    wrong = grouped_cross_entropy(states, weight, torch.tensor([[1]]), 0.0)
    assert right.item() == 0.0 and wrong.item() == pytest.approx(2e4)
