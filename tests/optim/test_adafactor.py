"""Adafactor against torch's own on matrices and vectors, and stacks against their matrices one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from openm6.optim.adafactor import Adafactor


def update_both(ours: nn.Parameter, others: list[nn.Parameter], muon: bool = False, size: float = 3) -> None:
    """Four steps of ours and of torch's on the parameters that `others` are: ours as one, or its matrices."""
    mine = Adafactor([{"params": [ours], "muon": muon}], lr=0.05, weight_decay=0.1)
    theirs = torch.optim.Adafactor(others, lr=0.05, weight_decay=0.1, foreach=False)
    for _ in range(4):
        ours.grad = torch.randn_like(ours) * size
        parts: list[Tensor] = [ours.grad] if len(others) == 1 else list(ours.grad)
        for other, part in zip(others, parts, strict=True):
            other.grad = part.clone()
        mine.step()
        theirs.step()


@pytest.mark.parametrize("shape", [(16, 24), (24, 1), (1, 9), (7,), (), (4, 5, 3), (2, 4, 3, 3)])
@pytest.mark.parametrize("size", [3, 1e-3, 1e-5, 1e-7])
def test_equals_torch_on_plain_tensors(shape: tuple[int, ...], size: float) -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    update_both(ours, [theirs], size=size)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_each_expert_of_a_stack_is_updated_by_itself() -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 8, 6) * torch.tensor([0.01, 1.0, 10.0]).view(3, 1, 1))
    apart = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    update_both(stack, apart, muon=True)
    torch.testing.assert_close(stack.detach(), torch.stack([one.detach() for one in apart]), rtol=1e-5, atol=1e-6)
