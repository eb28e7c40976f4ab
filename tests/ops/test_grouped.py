"""The grouped product against a loop over experts."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from openm6.base.errors import ConfigError
from openm6.ops.grouped import _IdleWithoutGradient, check_experts, grouped_product, grouped_product_reference
from openm6.ops.sparse_network import sparse_network


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


def test_idle_experts_get_no_gradient_whatever_the_kernel_leaves_there():
    weight = torch.randn(3, 2, 2, requires_grad=True)
    passed = _IdleWithoutGradient.apply(weight, torch.tensor([4, 0, 1]))
    assert torch.equal(passed, weight)
    garbage = torch.full_like(weight, float("nan"))
    garbage[[0, 2]] = 3.0
    (gradient,) = torch.autograd.grad(passed, [weight], garbage)
    assert gradient.amax((1, 2)).tolist() == [3.0, 0.0, 3.0]


def test_more_experts_than_a_gpu_takes_are_refused():
    check_experts(1024, torch.device("cpu"))
    check_experts(1023, torch.device("cuda"))
    with pytest.raises(
        ConfigError, match=r"1024 experts on one GPU, .* takes 1023: lower experts.num_experts"
    ):
        check_experts(1024, torch.device("cuda"))


def test_the_product_asks_how_many_experts_a_gpu_takes():
    """Without a GPU: tensors that have a device and shapes only."""
    with FakeTensorMode():
        rows = torch.empty(16, 8, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(1024, 8, 8, device="cuda", dtype=torch.bfloat16)
        counts = torch.empty(1024, device="cuda", dtype=torch.int64)
        with pytest.raises(ConfigError, match="1024 experts"):
            grouped_product(rows, weight, counts)
        with pytest.raises(ConfigError, match="1024 experts"):
            sparse_network(rows, torch.empty(16, 1), torch.empty(16, 1, dtype=torch.int64), weight, weight)
