"""Random bits by counters: known values stay, every bit of a word matters, and numbers are uniform."""

from __future__ import annotations

import pytest
import torch

from openm6.ops.random_bits import mix_32, mix_64, uniform


@pytest.mark.parametrize(("mix", "dtype", "width"), [(mix_32, torch.int32, 32), (mix_64, torch.int64, 64)])
def test_a_flipped_bit_flips_about_half_of_the_bits(mix, dtype: torch.dtype, width: int) -> None:
    words = torch.arange(-2000, 2000, dtype=dtype) * 12_345
    for bit in range(width):
        flip = torch.tensor(1 << bit if bit < width - 1 else -(1 << bit), dtype=dtype)
        changed = mix(words) ^ mix(words ^ flip)
        share = sum(((changed >> place) & 1).float().mean().item() for place in range(width)) / width
        assert 0.2 < share < 0.7, bit
    assert len(mix(words).unique()) == len(words), "a permutation"


def test_numbers_are_uniform_and_belong_to_their_seed_and_draw() -> None:
    seeds, draws = torch.tensor([3, 3, 9, -5]), torch.tensor([0, 1, 0, 0])
    found = uniform(seeds, draws, 50_000)
    assert bool(((found > 0) & (found < 1)).all())
    torch.testing.assert_close(found.mean(1), torch.full((4,), 0.5), rtol=0, atol=0.01)
    torch.testing.assert_close(found.var(1), torch.full((4,), 1 / 12), rtol=0, atol=0.01)
    assert len(found[:, 0].unique()) == 4
    assert torch.equal(uniform(seeds[2:3], draws[2:3], 7)[0], found[2, :7])


def test_the_largest_number_is_below_one() -> None:
    """All 24 bits of this one are set: rounded to 1, it would be infinite noise."""
    found = uniform(torch.tensor([31]), torch.tensor([0]), 1_467_006)[0]
    assert float(found.max()) == float(found[-1]) == 1 - 2.0**-24
