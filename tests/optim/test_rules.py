"""Update rules of 16, 4, 2 and 1 bytes: unbiased, no update of idle experts and without a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from openm6.optim.adafactor import Moments, advance, normalized, update_moments
from openm6.optim.config import PRECISION_OF_BYTES, OptimizerConfig
from openm6.optim.low_precision import block_length, fit_exponent, from_levels, refit, to_levels
from openm6.optim.rules import FactoredRule, Slots, UpdateArgs, UpdateRule, update_rule
from openm6.optim.sharding import REPLICATED

TIERS = [16, 4, 2, 1]


def rule_of(bytes_per_parameter: int) -> UpdateRule:
    return update_rule(OptimizerConfig(precision=PRECISION_OF_BYTES[bytes_per_parameter]))


def start(rule: UpdateRule, values: Tensor) -> Slots:
    stored = {slot.name: torch.empty(slot.shape, dtype=slot.dtype) for slot in rule.slots(tuple(values.shape))}
    rule.fill(stored, values, key=1)
    return stored


def apply_gradient(
    rule: UpdateRule, stored: Slots, gradient: Tensor, step: int, rate: float = 1e-3, **changes: Any
) -> None:
    values = {"lr": rate, "weight_decay": 0.0, "key": 1000 + step, "allowed": torch.tensor(True), **changes}
    rule.update(stored, gradient, UpdateArgs(**values))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tier", TIERS)
def test_the_bytes_per_parameter_are_those_of_the_tier(tier: int) -> None:
    shape = (8, 1024, 1024)
    kept = sum(slot.num_bytes for slot in rule_of(tier).slots(shape)) / (8 * 1024 * 1024)
    # Of the 16 bytes 4 are the gradient's, which exists for one layer at a time only.
    assert kept == pytest.approx(12 if tier == 16 else tier, rel=0.03)


@pytest.mark.parametrize("tier", TIERS)
def test_tiny_steps_are_not_lost(tier: int) -> None:
    """Steps far below the spacing of the stored values change the mean as they should: rounding is unbiased."""
    rule, values = rule_of(tier), 0.1 + 0.001 * normal(64, 128)
    stored = start(rule, values)
    before = rule.read(stored, torch.float32).mean()
    gradient, steps, rate = torch.ones(64, 128), 100, 1e-5
    for step in range(steps):
        apply_gradient(rule, stored, gradient, step, rate)
    moved = float(before - rule.read(stored, torch.float32).mean())
    assert moved == pytest.approx(steps * rate, rel=0.05)


@pytest.mark.parametrize("tier", TIERS)
def test_first_values_are_right_on_average(tier: int) -> None:
    values = 0.02 * normal(32, 64)
    mean = torch.zeros_like(values)
    for key in range(200):
        rule = rule_of(tier)
        stored = start(rule, values)
        rule.fill(stored, values, key)
        mean += rule.read(stored, torch.float32) / 200
    assert float((mean - values).abs().mean()) < {16: 1e-7, 4: 4e-6, 2: 4e-6, 1: 3e-5}[tier]


@pytest.mark.parametrize("tier", [4, 2, 1])
def test_experts_in_one_tensor_are_experts_on_their_own(tier: int) -> None:
    rule, values = rule_of(tier), 0.02 * normal(3, 16, 32)
    together, alone = start(rule, values), start(rule, values)
    for step in range(4):
        gradient = normal(3, 16, 32, seed=step) * torch.tensor([1.0, 50.0, 0.01])[:, None, None]
        gradient[step % 3] = 0  # one expert gets no token
        apply_gradient(rule, together, gradient, step)
        for expert in range(3):
            other = gradient.clone()
            other[[index for index in range(3) if index != expert]] = 0
            apply_gradient(rule, alone, other, step)
    for name, tensor in together.items():
        assert torch.equal(tensor, alone[name]), name


@pytest.mark.parametrize("tier", [4, 2, 1])
def test_an_expert_without_tokens_is_not_updated(tier: int) -> None:
    rule = rule_of(tier)
    stored = start(rule, 0.02 * normal(2, 16, 32))
    apply_gradient(rule, stored, normal(2, 16, 32, seed=1), 0)
    kept = {name: tensor[1].clone() for name, tensor in stored.items()}
    gradient = normal(2, 16, 32, seed=2)
    gradient[1] = 0
    for step in range(1, 30):
        apply_gradient(rule, stored, gradient, step, weight_decay=0.5)
    for name, tensor in stored.items():
        assert torch.equal(tensor[1], kept[name]), name
    assert stored["count"].tolist() == [30.0, 1.0]


@pytest.mark.parametrize("tier", TIERS)
def test_a_gradient_that_may_not_be_used_changes_nothing(tier: int) -> None:
    rule = rule_of(tier)
    stored = start(rule, 0.02 * normal(16, 32))
    apply_gradient(rule, stored, normal(16, 32), 0)
    kept = {name: tensor.clone() for name, tensor in stored.items()}
    apply_gradient(rule, stored, torch.full((16, 32), float("nan")), 1, allowed=torch.tensor(False))
    for name, tensor in stored.items():
        assert torch.equal(tensor, kept[name]), name


@pytest.mark.parametrize("tier", [4, 2, 1])
def test_a_record_on_the_host_takes_values_from_a_gpu(tier: int) -> None:
    """Without a GPU, by tensors that have a device and no values."""
    rule, shape = rule_of(tier), (3, 16, 128)
    assert isinstance(rule, FactoredRule)
    with FakeTensorMode():
        stored = {slot.name: torch.empty(slot.shape, dtype=slot.dtype) for slot in rule.slots(shape)}
        values, bits = (torch.empty(shape, dtype=dtype, device="cuda") for dtype in (torch.float32, torch.int32))
        rule.encode(stored, values, bits)


def test_int8_weights_without_a_gradient_stay_for_500_steps() -> None:
    """Scales are sticky: fitted again in each step, they would move every weight of a block."""
    rule = rule_of(1)
    stored = start(rule, 0.02 * normal(8, 64))
    gradient = torch.zeros(8, 64)
    gradient[:, ::16] = normal(8, 4, seed=3)  # four weights of each block have a gradient
    before = rule.read(stored, torch.float32)
    for step in range(500):
        apply_gradient(rule, stored, gradient * (1 if step % 2 else -1), step, rate=1e-4)
    after = rule.read(stored, torch.float32)
    still = gradient == 0
    assert torch.equal(after[still], before[still]) and not torch.equal(after[~still], before[~still])


def test_blocks_follow_weights_that_grow_and_shrink() -> None:
    values = 0.02 * normal(4, 128)
    exponent = fit_exponent(values)
    assert exponent.shape == (4, 2) and block_length(128) == 64 and block_length(96) == 32
    levels = to_levels(values, exponent)
    assert 90 < levels.abs().max() <= 111
    grown, raised = refit(levels * 5, exponent)
    assert grown.abs().max() <= 127 and (raised > exponent).all()
    torch.testing.assert_close(from_levels(grown, raised, torch.float32), 5 * values)
    halved, lowered = refit(levels / 4, exponent)
    assert (lowered == exponent - 4).all()
    torch.testing.assert_close(from_levels(halved, lowered, torch.float32), values / 4)
    nothing = refit(torch.zeros(1, 64), exponent[:1, :1])
    assert torch.equal(nothing[1], exponent[:1, :1])


def test_the_factored_moment_is_that_of_the_paper() -> None:
    """Against the formulas written out, for three steps of one matrix."""
    moments = Moments(torch.zeros(1, 4), torch.zeros(1, 6), torch.zeros(1))
    mean_row, mean_column = torch.zeros(4), torch.zeros(6)
    for step in (1, 2, 3):
        gradient = normal(1, 4, 6, seed=step)
        advance([update_moments(moments, gradient)], REPLICATED)
        decay = 1 - step**-0.8
        mean_row = decay * mean_row + (1 - decay) * (gradient[0] ** 2 + 1e-30).mean(1)
        mean_column = decay * mean_column + (1 - decay) * (gradient[0] ** 2 + 1e-30).mean(0)
        second = torch.outer(mean_row, mean_column) / mean_row.mean()
        expected = gradient[0] / second.sqrt()
        expected = expected / max(1.0, float(expected.square().mean().sqrt()))
        (update,) = advance([normalized(gradient, moments)], REPLICATED)
        torch.testing.assert_close(update[0], expected)


def test_moments_survive_a_conversion_to_another_rule() -> None:
    adam, factored = rule_of(16), rule_of(2)
    stored = start(adam, 0.02 * normal(16, 32))
    for step in range(3):
        apply_gradient(adam, stored, normal(16, 32, seed=step), step)
    state = adam.export_state(stored)
    assert state.second is not None
    other = start(factored, state.values)
    factored.import_state(other, state, key=5)
    torch.testing.assert_close(other["row_var"], state.second.mean(-1))
    back = factored.export_state(other)
    assert float(back.count) == 3.0 and back.first is None and back.second is not None
    torch.testing.assert_close(back.second.mean(0), state.second.mean(0))
