"""AdamW against torch's, and stochastic rounding, which accumulates steps below the spacing of bf16."""

from __future__ import annotations

import pytest
import torch

from openm6.optim.adamw import AdamW


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(4, 6).to(dtype)), torch.nn.Parameter(torch.randn(3).to(dtype))]


def run(optimizer, moved, steps=5):
    for step in range(steps):
        torch.manual_seed(step)
        for parameter in moved:
            parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
        optimizer.step()


def test_it_equals_torchs_to_the_bit():
    ours, theirs = parameters(), parameters()
    run(AdamW(ours, lr=0.01), ours)
    run(torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True), theirs)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_half_moments_stay_near_torchs():
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours, lr=0.01, state_dtype=torch.bfloat16)
    run(optimizer, ours)
    run(torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1), theirs)
    assert optimizer.state[ours[0]]["exp_avg"].dtype == torch.bfloat16
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.01, atol=0.002)


@pytest.mark.parametrize(("stochastic", "moves"), [(False, False), (True, True)])
def test_steps_below_half_an_ulp_add_up_only_with_stochastic_rounding(stochastic, moves):
    parameter = torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
    optimizer = AdamW([parameter], lr=1e-4, weight_decay=0.0, state_dtype=torch.bfloat16, stochastic=stochastic)
    for _ in range(50):  # 50 steps of 1e-4, and half an ulp below one is 2e-3
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    mean = parameter.detach().double().mean().item()
    assert (mean < 0.999) is moves
    assert mean == pytest.approx(0.995 if moves else 1.0, abs=1e-3)
