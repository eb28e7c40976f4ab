"""The norm's fast path against its twin."""

from __future__ import annotations

import pytest
import torch

from openm6.ops.normalise import rms_norm, rms_norm_reference


@pytest.mark.parametrize("weight_shape", [(16,), (3, 16)])
def test_values_and_gradients_equal_the_twin(weight_shape):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 16, requires_grad=True)
    weight = (1 + 0.3 * torch.randn(weight_shape)).requires_grad_()
    upstream = torch.randn_like(x)
    ours, twin = rms_norm(x, weight, 1e-3), rms_norm_reference(x, weight, 1e-3)
    torch.testing.assert_close(ours, twin)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (x, weight), upstream),
        torch.autograd.grad(twin, (x, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_slices_are_normalised_in_place_of_copies():
    torch.manual_seed(1)
    x = torch.randn(2, 4, 6, 16)
    torch.testing.assert_close(
        rms_norm(x[:, :, 1:3], torch.ones(16), 0.0), rms_norm(x, torch.ones(16), 0.0)[:, :, 1:3]
    )


def test_output_has_unit_mean_square_in_any_dtype():
    x = 37 * torch.randn(8, 256, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(rms_norm(x, torch.ones(256), 1e-6).square().mean(-1), torch.ones(8), atol=1e-5)
    half = rms_norm(x.bfloat16(), torch.ones(256), 1e-6)
    assert half.dtype == torch.bfloat16
