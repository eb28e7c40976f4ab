"""Draws, filters of scores, and noise that belongs to a row."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from openm6.inference.sampling import draw_from, filter_logits, gumbel, penalize

SCORES = torch.tensor([[2.0, 1.0, 0.0, -1.0, -50.0]])
COUNT = 4000


def noise(seeds: list[int], *shape: int) -> torch.Tensor:
    return gumbel(torch.tensor(seeds), torch.zeros(len(seeds), dtype=torch.int64), *shape)


def kept(k: int, p: float) -> torch.Tensor:
    return filter_logits(SCORES, torch.tensor([k]), torch.tensor([p]))


def drawn(scores: torch.Tensor) -> torch.Tensor:
    """Shares of the choices over many rows."""
    return torch.bincount((scores + noise(list(range(COUNT)), 5)).argmax(-1), minlength=5) / COUNT


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities(temperature: float) -> None:
    scores = SCORES / temperature
    by_quantile = torch.bincount(draw_from(scores.expand(COUNT, -1), torch.rand(COUNT)), minlength=5) / COUNT
    for found in (drawn(scores), by_quantile):
        torch.testing.assert_close(found, scores[0].softmax(-1), rtol=0, atol=0.03)


def test_a_draw_is_where_the_cumulative_probability_reaches_the_quantile() -> None:
    scores = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(4, -1)
    found = draw_from(scores, torch.tensor([2.0**-25, 0.499, 0.501, 1 - 2.0**-24]))
    assert found.tolist() == [1, 1, 3, 3], "codes of probability 0 are never drawn"


def test_top_k_leaves_k() -> None:
    found = drawn(kept(2, 1.0))
    assert (found > 0).tolist() == [True, True, False, False, False]
    torch.testing.assert_close(found[:2], SCORES[0, :2].softmax(-1), rtol=0, atol=0.03)


def test_top_p_leaves_the_smallest_set_of_that_mass() -> None:
    found = kept(5, 0.8).isfinite()  # probabilities .64 .24 .09 .03 .00
    assert found.tolist() == [[True, True, False, False, False]]
    assert kept(5, 0.5).isfinite().sum() == 1
    assert kept(5, 1.0).isfinite().all()
    assert kept(5, 1e-9).isfinite().sum() == 1, "the most likely one always stays"


def test_each_row_is_filtered_by_its_own_settings() -> None:
    found = filter_logits(SCORES.expand(3, -1), torch.tensor([1, 5, 3]), torch.tensor([1.0, 0.8, 1.0]))
    assert found.isfinite().sum(1).tolist() == [1, 2, 3]


def test_a_penalty_is_that_of_transformers() -> None:
    """Tokens that were seen, twice or once, count once; others keep their scores to the bit."""
    scores, ids = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 1, 4]]).expand(3, 3)
    seen = torch.zeros(3, 20, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (0.8, 1.0, 1.7):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
        torch.testing.assert_close(penalize(scores, seen, torch.full((3,), penalty)), expected)


def test_noise_belongs_to_its_row() -> None:
    together = noise([3, 9, 5], 4, 2)
    for row, seed in enumerate((3, 9, 5)):
        assert torch.equal(noise([seed], 4, 2)[0], together[row])
    assert together.isfinite().all() and not torch.equal(together[0], together[1])


def test_gumbel_noise_has_its_mean() -> None:
    assert float(noise([0], 100_000).mean()) == pytest.approx(0.5772, abs=0.02)
