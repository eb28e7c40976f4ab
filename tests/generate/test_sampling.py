"""Choosing by scores, and noise that belongs to a row."""

from __future__ import annotations

import pytest
import torch

from openm6.generate.sampling import RowNoise, Sampling, choose, filtered

SCORES = torch.tensor([[2.0, 1.0, 0.0, -1.0, -50.0]])


def drawn(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    """Shares of the choices over many rows."""
    noise = RowNoise(list(range(count)))
    return torch.bincount(choose(SCORES.expand(count, -1), sampling, noise), minlength=5) / count


def test_temperature_zero_takes_the_likeliest() -> None:
    assert drawn(Sampling(temperature=0), 10).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities(temperature: float) -> None:
    found = drawn(Sampling(temperature=temperature))
    torch.testing.assert_close(found, (SCORES[0] / temperature).softmax(-1), rtol=0, atol=0.03)


def test_top_k_leaves_k() -> None:
    found = drawn(Sampling(temperature=1.0, top_k=2))
    assert (found > 0).tolist() == [True, True, False, False, False]
    torch.testing.assert_close(found[:2], SCORES[0, :2].softmax(-1), rtol=0, atol=0.03)


def test_top_p_leaves_the_smallest_set_of_that_mass() -> None:
    kept = filtered(SCORES, None, 0.8).isfinite()  # probabilities .64 .24 .09 .03 .00
    assert kept.tolist() == [[True, True, False, False, False]]
    assert filtered(SCORES, None, 0.5).isfinite().sum() == 1
    assert filtered(SCORES, None, 1.0).isfinite().all()
    assert filtered(SCORES, None, 1e-9).isfinite().sum() == 1, "the likeliest always stays"


def test_noise_belongs_to_its_row() -> None:
    together = RowNoise([3, 9, 5]).gumbel(4, 2)
    for row, seed in enumerate((3, 9, 5)):
        assert torch.equal(RowNoise([seed]).gumbel(4, 2)[0], together[row])
    assert together.isfinite().all() and not torch.equal(together[0], together[1])


def test_gumbel_noise_has_its_mean() -> None:
    assert float(RowNoise([0]).gumbel(100_000).mean()) == pytest.approx(0.5772, abs=0.02)
