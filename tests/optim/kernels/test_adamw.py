from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from openm6.optim.adamw import adamw_reference, rule_numbers  # noqa: E402
from openm6.optim.kernels import adamw  # noqa: E402

GROUP = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def tensors(device, dtypes, shape=(5, 33)):
    torch.manual_seed(0)
    p, g, m, v = (torch.randn(shape, device=device) for _ in range(4))
    p, m, v = (value.to(dtype) for value, dtype in zip((p, 0.1 * m, v.square() * 0.01), dtypes, strict=True))
    return p, g.to(dtypes[0]), m, v


def run_kernel(p, g, m, v, step, seed, stochastic, scale=1.0):
    numbers = torch.tensor(rule_numbers(GROUP, step), device=p.device)
    scale, seed = torch.tensor([scale], device=p.device), torch.tensor([seed], device=p.device)
    adamw.adamw_pass(p, g, m, v, numbers, scale, seed, GROUP["betas"], GROUP["eps"], stochastic)


@pytest.mark.parametrize("block", [16, 2048])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.bfloat16), (torch.bfloat16,) * 3]
)
@pytest.mark.parametrize("stochastic", [False, True])
def test_one_pass_equals_its_twin(device, monkeypatch, dtypes, stochastic, block):
    monkeypatch.setattr(adamw, "BLOCK_ELEMENTS", block)
    p, g, m, v = tensors(device, dtypes)
    twin, state = p.clone(), {"step": 3.0, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    adamw_reference(twin, g, state, GROUP, stochastic, 77)
    run_kernel(p, g, m, v, 3.0, 77, stochastic)
    for ours, theirs in ((p, twin), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        close = 2**-7 if ours.dtype == torch.bfloat16 else 1e-5  # at most one step of bf16 apart
        torch.testing.assert_close(ours, theirs, rtol=close, atol=1e-6)
        if stochastic and ours.dtype == torch.bfloat16 and ours is not m:
            assert (ours == theirs).float().mean() > 0.95  # the same bits of chance


def test_a_scale_that_is_no_number_changes_nothing(device):
    p, g, m, v = tensors(device, (torch.float32,) * 3)
    before = [tensor.clone() for tensor in (p, m, v)]
    run_kernel(p, g, m, v, 1.0, 0, False, scale=float("nan"))
    assert all(torch.equal(now, then) for now, then in zip((p, m, v), before, strict=True))


def test_the_gradient_is_scaled(device):
    p, g, m, v = tensors(device, (torch.float32,) * 3)
    other = [tensor.clone() for tensor in (p, 0.5 * g, m, v)]
    run_kernel(p, g, m, v, 1.0, 0, False, scale=0.5)
    run_kernel(*other, 1.0, 0, False)
    torch.testing.assert_close(p, other[0])


def test_rounding_up_the_largest_weight_stays_finite(device):
    """The weight rests above the largest bf16, where any random bit would carry it to infinity."""
    p = torch.full((64,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16, device=device)
    g, m, v = -torch.ones_like(p), torch.zeros_like(p), torch.zeros_like(p)
    twin, state = p.clone(), {"step": 1.0, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    group = {**GROUP, "lr": 5e35, "weight_decay": 0.0}
    adamw_reference(twin, g, state, group, True, 5)
    numbers = torch.tensor(rule_numbers(group, 1.0), device=device)
    scale, seed = torch.ones(1, device=device), torch.tensor([5], device=device)
    adamw.adamw_pass(p, g, m, v, numbers, scale, seed, GROUP["betas"], GROUP["eps"], True)
    assert p.isfinite().all()
    assert torch.equal(p, twin)


def test_autograd_notices_that_a_saved_weight_was_moved(device):
    p, g, m, v = tensors(device, (torch.float32,) * 3)
    p.requires_grad_()
    loss = p.square().sum()
    with torch.no_grad():
        run_kernel(p, g, m, v, 1.0, 0, False)
    assert m._version == v._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
