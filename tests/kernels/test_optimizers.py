"""The kernels of the optimizers equal their references in torch."""

from __future__ import annotations

import math

import pytest
import torch

from openm6 import kernels

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402

from openm6.kernels import optimizers  # noqa: E402
from openm6.kernels.optimizers import bits_at, round_bf16  # noqa: E402
from openm6.optim.adamw import AdamW, adamw_reference, coefficients  # noqa: E402
from openm6.optim.config import PRECISION_OF_BYTES, OptimizerConfig  # noqa: E402
from openm6.optim.low_precision import (  # noqa: E402
    BF16_LARGEST,
    STEPS,
    block_length,
    from_levels,
    matrix_keys,
    random_bits,
    round_to_bf16,
)
from openm6.optim.rules import UpdateArgs, update_rule  # noqa: E402

GROUP = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def tensors(device, dtypes, shape=(5, 33)):
    torch.manual_seed(0)
    p, g, m, v = (torch.randn(shape, device=device) for _ in range(4))
    p, m, v = (value.to(dtype) for value, dtype in zip((p, 0.1 * m, v.square() * 0.01), dtypes, strict=True))
    return p, g.to(dtypes[0]), m, v


def run_kernel(p, g, m, v, step, seed, stochastic, group=GROUP):
    numbers, aligned = coefficients(group, step), optimizers.alignment((p, g, m, v))
    optimizers.adamw_update(
        [(p, g, m, v)], [numbers], [seed], group["betas"], group["eps"], stochastic, aligned
    )  # fmt: skip


@pytest.mark.parametrize("block", [16, 2048])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.bfloat16), (torch.bfloat16,) * 3]
)
@pytest.mark.parametrize("stochastic", [False, True])
def test_adamw_equals_its_reference(device, monkeypatch, dtypes, stochastic, block):
    monkeypatch.setattr(optimizers, "BLOCK_ELEMENTS", block)
    p, g, m, v = tensors(device, dtypes)
    expected, state = p.clone(), {"step": 3.0, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    adamw_reference(expected, g, state, GROUP, stochastic, 77)
    run_kernel(p, g, m, v, 3.0, 77, stochastic)
    for ours, theirs in ((p, expected), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        close = 2**-7 if ours.dtype == torch.bfloat16 else 1e-5  # at most one step of bf16 apart
        torch.testing.assert_close(ours, theirs, rtol=close, atol=1e-6)
        if stochastic and ours.dtype == torch.bfloat16 and ours is not m:
            assert (ours == theirs).float().mean() > 0.95  # the same random bits


@pytest.mark.parametrize(("dtype", "stochastic"), [(torch.float32, False), (torch.bfloat16, True)])
def test_an_adamw_step_in_kernels_equals_one_in_torch(device, monkeypatch, dtype, stochastic):
    """One launch per alignment: the kernel must find each parameter's tensors, size, numbers and seed.

    An update that the device leaves out changes nothing.
    """
    runs, launches = [], []
    update = optimizers.adamw_update
    monkeypatch.setattr(optimizers, "adamw_update", lambda *args: (launches.append(len(args[0])), update(*args)))
    monkeypatch.setattr(optimizers, "BLOCK_ELEMENTS", 64)
    for in_kernel in (True, False):
        monkeypatch.setattr(kernels, "available", lambda device, choice=in_kernel: choice)
        torch.manual_seed(0)
        shapes = ((5, 33), (0, 3), (7,), (64, 3), (130,), (256, 2), (16,))
        parameters = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.1, "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=0.01, state_dtype=torch.float32, stochastic=stochastic)
        assert optimizer.skips_on_device == in_kernel
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape).to(device, dtype)
            optimizer.skip = torch.zeros((), device=device)
            optimizer.step()
            if in_kernel:
                optimizer.skip = optimizer.skip + float("nan")
                optimizer.step()
                optimizer.uncount()
        runs.append((parameters, [optimizer.state[parameter] for parameter in parameters]))
    assert launches == [3, 4] * 6  # not aligned, and aligned
    close = 1e-5 if dtype == torch.float32 else 2**-7  # at most one step of bf16 apart
    for ours, theirs in zip(*(parameters for parameters, _ in runs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=1e-6)
        assert not stochastic or not len(ours) or (ours == theirs).float().mean() > 0.95  # the same random bits
    for ours, theirs in zip(*(states for _, states in runs), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)


def test_rounding_up_the_largest_weight_stays_finite(device):
    """The weight rests above the largest bf16, where any random bit would carry it to infinity."""
    p = torch.full((64,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16, device=device)
    g, m, v = -torch.ones_like(p), torch.zeros_like(p), torch.zeros_like(p)
    expected, state = p.clone(), {"step": 1.0, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    group = {**GROUP, "lr": 5e35, "weight_decay": 0.0}
    adamw_reference(expected, g, state, group, True, 5)
    run_kernel(p, g, m, v, 1.0, 5, True, group)
    assert p.isfinite().all()
    assert torch.equal(p, expected)


def test_autograd_notices_that_a_saved_weight_was_updated(device):
    p, g, m, v = tensors(device, (torch.float32,) * 3)
    p.requires_grad_()
    loss = p.square().sum()
    with torch.no_grad():
        run_kernel(p, g, m, v, 1.0, 0, False)
    assert m._version == v._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@triton.jit
def bits_kernel(key, out, BLOCK: tl.constexpr) -> None:  # noqa: N803
    position = tl.arange(0, BLOCK)
    bits = bits_at(position, tl.load(key).to(tl.uint32, bitcast=True))
    tl.store(out + position, bits.to(tl.int32, bitcast=True))


@triton.jit
def rounding_kernel(value, bits, out, BLOCK: tl.constexpr) -> None:  # noqa: N803
    position = tl.arange(0, BLOCK)
    noise = tl.load(bits + position).to(tl.uint32, bitcast=True)
    tl.store(out + position, round_bf16(tl.load(value + position), noise))


@pytest.mark.parametrize("key", [0, 7, 2**31 - 5])
def test_bits_equal_those_of_torch(device, key):
    out = torch.empty(64, dtype=torch.int32, device=device)
    bits_kernel[(1,)](matrix_keys(1, key, 0, device), out, BLOCK=64)
    assert out.tolist() == random_bits(1, 64, key)[0].tolist()


@pytest.mark.parametrize("pushed", [0, 0xFFFF])
def test_rounding_agrees_with_its_reference_also_at_the_largest_values(device, pushed):
    largest = torch.finfo(torch.float32).max  # lies above the largest bf16
    odd = [largest, -largest, BF16_LARGEST, -BF16_LARGEST, float("inf"), -float("inf"), float("nan"), 0.0]
    value = torch.cat([torch.tensor(odd), torch.randn(56)]).to(device)
    bits = torch.full((64,), pushed, dtype=torch.int32, device=device)
    out = torch.empty(64, dtype=torch.bfloat16, device=device)
    rounding_kernel[(1,)](value, bits, out, BLOCK=64)
    assert torch.equal(out.isnan(), value.isnan())
    assert torch.equal(out.nan_to_num(), round_to_bf16(value, bits).nan_to_num())
    assert out[:4].isfinite().all()


@pytest.mark.parametrize("shape", [(2, 40, 64), (33, 320)])
# `lerp` has a form for either half of the weights.
@pytest.mark.parametrize(("bytes_per_parameter", "beta"), [(4, 0.9), (4, 0.3), (2, 0.9), (1, 0.9)])
def test_adafactor_equals_its_reference(bytes_per_parameter, shape, beta, device, monkeypatch):
    rule = update_rule(OptimizerConfig(precision=PRECISION_OF_BYTES[bytes_per_parameter], betas=(beta, 0.95)))
    values = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    both = [
        {slot.name: torch.empty(slot.shape, dtype=slot.dtype, device=device) for slot in rule.slots(shape)}
        for _ in range(2)
    ]
    for in_kernel, stored in zip((True, False), both, strict=True):
        rule.fill(stored, values, 1)
        monkeypatch.setattr(kernels, "available", lambda device, choice=in_kernel: choice)
        for step in range(3):
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(device, torch.bfloat16)
            if step == 1 and len(shape) == 3:
                gradient[1] = 0
            changed = {name for name in ("weight", "momentum") if name in stored}
            before = {name: stored[name]._version for name in changed}
            rule.update(stored, gradient, UpdateArgs(0.003, 0.1, 77 + step, torch.tensor(step < 2, device=device)))
            assert all(stored[name]._version > before[name] for name in changed)  # so that autograd notices
    for name, ours in both[0].items():
        expected = both[1][name]
        if name in ("weight", "momentum"):
            assert (ours != expected).float().mean() < 0.01
        else:
            torch.testing.assert_close(ours.float(), expected.float(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 40, 64), (33, 320), (7, 24), (5, 3), (0, 64)])
def test_weights_of_int8_are_those_of_the_reference_to_the_bit(device, dtype, shape):
    """For every exponent, and blocks of 64, 8 and 1."""
    levels = torch.randint(-127, 128, shape, dtype=torch.int8)
    blocks = shape[-1] // block_length(shape[-1])
    exponent = torch.arange(-127, 128, dtype=torch.int8).repeat(9)[: math.prod(shape[:-1]) * blocks]
    exponent = exponent.view(*shape[:-1], blocks)
    ours = optimizers.dequantize(levels.to(device), exponent.to(device), dtype, STEPS)
    expected = from_levels(levels, exponent, torch.float32)
    if device.type == "cpu" and dtype == torch.bfloat16:
        # Triton's interpreter cuts the lower half off, where a GPU rounds as torch does.
        expected = (expected.view(torch.int32) & -65536).view(torch.float32)
    assert ours.dtype == dtype and torch.equal(ours.cpu(), expected.to(dtype))


def test_offloaded_int8_weights_are_read_by_the_kernel(device, monkeypatch):
    rule = update_rule(OptimizerConfig(precision="int8-adafactor"))
    stored = {slot.name: torch.empty(slot.shape, dtype=slot.dtype, device=device) for slot in rule.slots((6, 128))}
    rule.fill(stored, torch.randn(6, 128, device=device), 1)
    found, dequantize = [], optimizers.dequantize
    monkeypatch.setattr(optimizers, "dequantize", lambda *args: found.append(1) or dequantize(*args))
    read = []
    for in_kernel in (True, False):
        monkeypatch.setattr(kernels, "available", lambda device, choice=in_kernel: choice)
        read.append(rule.read(stored, torch.float32))
    assert len(found) == 1 and torch.equal(*read)
