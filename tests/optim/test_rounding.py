"""Stochastic rounding: unbiased, with NaN and infinities kept, and a function of counters alone."""

from __future__ import annotations

import pytest
import torch

from openm6.optim.low_precision import BF16_LARGEST, random_bits, round_to_bf16, round_to_levels


def random_bits_reference(num_matrices: int, values: int, key: int) -> list[list[int]]:
    """`random_bits` in Python's unbounded integers."""
    keys = [mix_reference(index * 0x9E3779B9 + key) for index in range(num_matrices)]
    mixed = [[mix_reference(position * 0x9E3779B9 + own) for position in range(values)] for own in keys]
    return [[(bits + 2**31) % 2**32 - 2**31 for bits in matrix] for matrix in mixed]


def mix_reference(x: int) -> int:
    x %= 2**32
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize("key", [0, 7, 2**62 + 12345])
def test_bits_equal_their_reference(key: int) -> None:
    assert random_bits(3, 17, key).tolist() == random_bits_reference(3, 17, key)


def test_bits_do_not_depend_on_neighbours() -> None:
    """One expert alone, or a shard of experts, gets the bits it gets among all."""
    whole = random_bits(6, 40, 11)
    assert torch.equal(whole[2:5], random_bits(3, 40, 11, first=2))
    assert torch.equal(whole[:, :8], random_bits(6, 8, 11))


def test_bits_are_even_and_differ_by_key_and_matrix() -> None:
    bits = random_bits(2, 200_000, 5)
    means = [((bits >> position) & 1).float().mean().item() for position in range(32)]
    assert means == pytest.approx([0.5] * 32, abs=0.005)
    other = random_bits(2, 200_000, 6)
    assert (bits == other).sum() < 10 and (bits[0] == bits[1]).sum() < 10
    stacked = torch.stack([bits[0], bits[1], other[0]]).double()
    assert torch.corrcoef(stacked).fill_diagonal_(0).abs().max() < 0.01


@pytest.mark.parametrize("value", [1.001, -0.3337, 3e-9, 1234.5678])
def test_bf16_is_right_on_average(value: float) -> None:
    x = torch.full((1, 100_000), value)
    rounded = round_to_bf16(x, random_bits(1, 100_000, 3)).double()
    assert len(rounded.unique()) == 2
    step = float(rounded.max() - rounded.min())
    assert abs(float(rounded.mean()) - float(x[0, 0])) < 0.01 * step


def test_what_bf16_can_hold_stays_and_what_is_not_finite_passes() -> None:
    exact = torch.randn(1, 1000).to(torch.bfloat16)
    assert torch.equal(round_to_bf16(exact.float(), random_bits(1, 1000, 1)), exact)
    odd = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.4028235e38, -3.4028235e38]])
    rounded = round_to_bf16(odd, torch.full((1, 5), -1, dtype=torch.int32))  # all bits set: the worst case
    assert rounded[0, 0].isnan() and rounded[0, 1:3].tolist() == [float("inf"), -float("inf")]
    assert rounded[0, 3:].tolist() == [BF16_LARGEST, -BF16_LARGEST]
    nan = torch.tensor([[0x7FFFFFFF]], dtype=torch.int32).view(torch.float32)  # a NaN of all ones
    assert round_to_bf16(nan, torch.full((1, 1), -1, dtype=torch.int32)).isnan().all()


@pytest.mark.parametrize("value", [0.25, -1.75, 3.01])
def test_whole_numbers_are_right_on_average(value: float) -> None:
    x = torch.full((1, 100_000), value)
    assert float(round_to_levels(x, random_bits(1, 100_000, 9)).double().mean()) == pytest.approx(value, abs=0.006)
    assert torch.equal(round_to_levels(x.round(), random_bits(1, 100_000, 9)), x.round().to(torch.int8))
