"""The kernel of the cross-entropy equals its reference."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from openm6.kernels import cross_entropy  # noqa: E402
from openm6.ops.losses import cross_entropy_with_gradient  # noqa: E402


@pytest.mark.parametrize("block", [16, 4096])
def test_losses_and_gradient(device, monkeypatch, block):
    monkeypatch.setattr(cross_entropy, "BLOCK_V", block)
    logits = 3 * torch.randn(6, 40, device=device)
    label, weight = torch.tensor([0, 39, 7, 7, 12, 30], device=device), torch.rand(6, device=device)
    weight[2] = 0
    ours, theirs = logits.clone(), logits.to("cpu", copy=True)  # in plain torch on the CPU
    torch.testing.assert_close(
        cross_entropy.cross_entropy_with_gradient(ours, label, weight).cpu(),
        cross_entropy_with_gradient(theirs, label.cpu(), weight.cpu()),
    )
    torch.testing.assert_close(ours.cpu(), theirs)
    assert ours[2].abs().max() == 0
