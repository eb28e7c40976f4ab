"""Moments of a shared set, handed on to its layers."""

from __future__ import annotations

import pytest
import torch

from openm6.checkpoint.optimizer import Moments, delink_moments

SOURCES = {"layers.0.w": "layers.0.w", "layers.1.w": "layers.0.w", "layers.2.w": "layers.2.w"}
TENSORS = {
    "layers.0.w::exp_avg": torch.tensor([2.0, 4.0]),
    "layers.0.w::exp_avg_sq": torch.tensor([8.0, 16.0]),
    "layers.0.w::step": torch.tensor(5.0),
    "layers.2.w::exp_avg": torch.tensor([3.0]),
    "norm::exp_avg_sq": torch.tensor([7.0]),
}


@pytest.mark.parametrize(("moments", "second"), [("independent", [4.0, 8.0]), ("aligned", [2.0, 4.0])])
def test_moments_are_shared_out(moments: Moments, second: list[float]) -> None:
    new = delink_moments(TENSORS, SOURCES, moments)
    for layer in (0, 1):
        assert new[f"layers.{layer}.w::exp_avg"].tolist() == [1.0, 2.0]
        assert new[f"layers.{layer}.w::exp_avg_sq"].tolist() == second
        assert new[f"layers.{layer}.w::step"].item() == 5.0
    # what one layer had for itself, and what was never shared, stays as it was
    assert new["layers.2.w::exp_avg"].tolist() == [3.0] and new["norm::exp_avg_sq"].tolist() == [7.0]
    assert new["layers.0.w::exp_avg"] is not new["layers.1.w::exp_avg"]


def test_reset_forgets_only_what_was_shared() -> None:
    new = delink_moments(TENSORS, SOURCES, "reset")
    assert sorted(new) == ["layers.2.w::exp_avg", "norm::exp_avg_sq"]


def test_the_assumptions_hold_for_gradients_like_them() -> None:
    """E[G²]/L is the layers' own second moment for independent gradients, E[G²]/L² for equal ones."""
    draw = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0))
    own = float(draw.square().mean())
    assert float(draw.sum(0).square().mean()) / 4 == pytest.approx(own, rel=0.03)
    alike = draw[:1].expand(4, -1)
    assert float(alike.sum(0).square().mean()) / 16 == pytest.approx(float(draw[0].square().mean()), rel=1e-5)
