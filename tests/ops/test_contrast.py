"""InfoNCE against its definition, one pair at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openm6.ops.contrast import contrast_nats


def naive(query: Tensor, gallery: Tensor, same: Tensor, partner: Tensor, scale: float) -> list[float]:
    """−log(e^own / Σ e^other), written out."""
    found = []
    for q, own in enumerate(partner.tolist()):
        scores = {
            g: math.exp(scale * float(query[q] @ gallery[g]))
            for g in range(len(gallery))
            if g == own or not same[q, g]
        }
        found.append(-math.log(scores[own] / sum(scores.values())))
    return found


@pytest.mark.parametrize("shift", [0, 2])
def test_it_is_what_the_formula_says(shift: int) -> None:
    torch.manual_seed(shift)
    query, gallery = torch.randn(4, 8), torch.randn(6, 8)
    same = torch.rand(4, 6) < 0.3
    partner = torch.arange(4) + shift
    nats = contrast_nats(query, gallery, same, partner, 1.5)
    assert nats.tolist() == pytest.approx(naive(query, gallery, same, partner, 1.5), rel=1e-5)


def test_twins_are_no_wrong_answers() -> None:
    query = torch.eye(2)
    twins = torch.ones(2, 2, dtype=torch.bool)
    assert contrast_nats(query, query, twins, torch.arange(2), 10.0).tolist() == [0.0, 0.0]


def test_no_pairs_give_no_losses() -> None:
    empty = torch.zeros(0, 4)
    nats = contrast_nats(empty, torch.eye(4), torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0).long(), 1.0)
    assert nats.shape == (0,)
