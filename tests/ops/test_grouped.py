"""The grouped product against a loop over experts."""

from __future__ import annotations

import pytest
import torch

from openm6.ops.grouped import grouped_product, grouped_product_reference


@pytest.mark.parametrize("counts", [[5, 3, 4, 8], [0, 20, 0, 0], [7, 0, 13, 0], [20, 0, 0, 0]])
def test_values_and_gradients_equal_the_twin(counts):
    torch.manual_seed(0)
    rows = torch.randn(20, 16, requires_grad=True)
    weight = torch.randn(4, 16, 24, requires_grad=True)
    upstream = torch.randn(20, 24)
    ours = grouped_product(rows, weight, torch.tensor(counts))
    twin = grouped_product_reference(rows, weight, torch.tensor(counts))
    torch.testing.assert_close(ours, twin)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (rows, weight), upstream),
        torch.autograd.grad(twin, (rows, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_autocast_decides_the_dtype():
    rows, weight = torch.ones(4, 8), torch.ones(2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_product(rows, weight, torch.tensor([1, 3])).dtype == torch.bfloat16
    assert grouped_product(rows, weight, torch.tensor([1, 3])).dtype == torch.float32
