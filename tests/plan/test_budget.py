"""Bytes of each tier, by hand."""

from __future__ import annotations

import pytest

from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig
from openm6.plan.activations import Activations
from openm6.plan.budget import BY_OPTIMIZER, CONTEXT, TIERS, device_budget, kept_inputs

CONFIG = BackboneConfig(
    width=64,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    dense=DenseConfig(hidden=256, ffn="gelu"),
)
GIB = 2**30


def test_a_tier_is_called_by_the_bytes_that_it_keeps() -> None:
    assert all(tier.kept == size for size, tier in TIERS.items())
    assert set(BY_OPTIMIZER.values()) <= set(TIERS)


def test_sixteen_bytes_hold_weights_moments_and_the_larger_of_activations_and_gradients() -> None:
    budget = device_budget(CONFIG, 1e9, 1e8, TIERS[16], 1000, 80 * GIB, learned_logits=0.0)
    assert (budget.states, budget.activations, budget.context) == (12e9, 4e9, CONTEXT)
    assert not budget.streamed and budget.device == 16e9 + CONTEXT
    crowded = device_budget(CONFIG, 1e3, 1e3, TIERS[16], 1000, 80 * GIB, learned_logits=5.0)
    assert crowded.activations == 1000 * Activations().bytes_a_token(CONFIG, 2) + 5.0


@pytest.mark.parametrize(("size", "states"), [(4, 4e9), (2, 2e9), (1, 1e9)])
def test_small_tiers_hold_no_gradients_but_a_layer_s(size: int, states: float) -> None:
    budget = device_budget(CONFIG, 1e9, 1e8, TIERS[size], 1024, 80 * GIB, learned_logits=0.0)
    assert budget.states == states and budget.host == 0
    assert budget.activations == 2 * 1024 * 64 * 3  # bf16 input of each block
    assert budget.working == 1024 * Activations().largest_layer(CONFIG, 2) + 2 * 1e8


def test_what_does_not_fit_is_streamed_and_nothing_is_lost() -> None:
    budget = device_budget(CONFIG, 40e9, 1e9, TIERS[2], 1024, 32 * GIB, learned_logits=0.0)
    assert budget.streamed and budget.states + budget.host == 80e9
    assert budget.device == pytest.approx(32 * GIB)


def test_a_micro_batch_shrinks_until_a_layer_fits() -> None:
    budget = device_budget(CONFIG, 1e6, 1e5, TIERS[2], 1 << 20, 4 * GIB, learned_logits=0.0)
    row = Activations().largest_layer(CONFIG, 2)
    assert budget.micro_batch * row <= GIB < 2 * budget.micro_batch * row


def test_elements_of_a_dense_layer_by_hand() -> None:
    kept = Activations(width=1, query=2, key_value=3, dense_width=4)
    assert kept.bytes_a_token(CONFIG, 4) == 4 * 3 * (64 + 2 * 64 + 3 * 64 + 4 * 64 + 2 * 256)


def test_of_a_group_the_first_input_is_kept_and_of_the_group_at_work_all() -> None:
    assert [kept_inputs(12, every) for every in (1, 3, 5, 12)] == [12, 4 + 2, 3 + 4, 1 + 11]
    sizes = (1e9, 1e8, TIERS[2], 1024, 80 * GIB)
    each, third = (device_budget(CONFIG, *sizes, 0.0, every) for every in (1, 3))
    assert each.activations - third.activations == 0  # three layers: all of them are at work
    assert (
        device_budget(CONFIG.model_copy(update={"num_layers": 12}), *sizes, 0.0, 3).activations
        == 2 * 1024 * 64 * 6
    )
