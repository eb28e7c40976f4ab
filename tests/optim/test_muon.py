"""Muon against torch's own on matrices, and stacks against their matrices one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openm6.optim.muon import Muon, newton_schulz


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (20, 20), (1, 8)])
def test_equals_torch_on_matrices(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    groups = [{"params": [ours], "muon": True}]
    mine = Muon(groups, lr=0.02, weight_decay=0.1, momentum=0.9, dtype=torch.bfloat16)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_rest_equals_adamw() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    mine = Muon([{"params": ours, "muon": False}], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    reference = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    for _ in range(4):
        for left, right in zip(ours, theirs, strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        mine.step()
        reference.step()
        assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", [(4, 6, 10), (4, 10, 6)])
def test_a_stack_is_its_matrices_one_by_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    stack = torch.randn(shape)
    apart = torch.stack([newton_schulz(matrix, torch.float32) for matrix in stack])
    torch.testing.assert_close(newton_schulz(stack, torch.float32), apart)


def test_half_precision_is_exact_enough() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 32, 64)
    full, half = newton_schulz(stack, torch.float32), newton_schulz(stack, torch.bfloat16)
    assert (full - half.float()).norm() < 0.02 * full.norm()


def test_the_result_is_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(3, 32, 64), torch.float32))
    assert 0.6 < values.min() and values.max() < 1.3


def test_a_gradient_of_zero_gives_no_update() -> None:
    assert torch.equal(newton_schulz(torch.zeros(4, 6), torch.float32), torch.zeros(4, 6))


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="matrices or stacks"):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "muon": True}], lr=0.1)
