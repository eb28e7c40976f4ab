"""SwiGLU with its own adjoint against its twin."""

from __future__ import annotations

import torch

from openm6.ops.activation import swiglu, swiglu_reference


def test_swiglu_equals_its_twin():
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(swiglu(x), swiglu_reference(x))


def test_swiglu_gradient_is_exact():
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (x,))
