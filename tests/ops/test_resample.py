"""Resampling: the same sound at another rate."""

from __future__ import annotations

import math

import pytest
import torch

from openm6.ops.resample import resample, smooth


def sine(rate: int, pitch: float, seconds: float = 0.5) -> torch.Tensor:
    return torch.sin(2 * math.pi * pitch * torch.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize(
    ("old", "new"), [(8000, 16_000), (44_100, 16_000), (48_000, 16_000), (16_000, 22_050)]
)
@pytest.mark.parametrize("pitch", [100.0, 440.0, 3000.0])
def test_a_sine_stays_the_same_sine(old: int, new: int, pitch: float) -> None:
    found, wanted = resample(sine(old, pitch), old, new), sine(new, pitch)
    assert found.shape == wanted.shape
    inner = slice(new // 20, -new // 20)  # an abrupt start and end ring
    assert float((found - wanted)[inner].abs().max()) < 0.02


def test_what_the_new_rate_cannot_hold_is_removed() -> None:
    mixed = sine(48_000, 440.0) + sine(48_000, 12_000.0)
    found = resample(mixed, 48_000, 16_000)[800:-800]
    assert float((found - sine(16_000, 440.0)[800:-800]).abs().max()) < 0.05


def test_the_same_rate_changes_nothing() -> None:
    samples = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resample(samples, 16_000, 16_000), samples)


@pytest.mark.parametrize(("length", "old", "wanted"), [(1, 8000, 2), (100, 44_100, 37), (1, 48_000, 1)])
def test_lengths_are_rounded_up(length: int, old: int, wanted: int) -> None:
    assert len(resample(torch.ones(length), old, 16_000)) == wanted


def test_lengths_of_transforms_have_small_factors() -> None:
    def least(number: int) -> int:
        while True:
            rest = number
            for factor in (2, 3, 5):
                while rest % factor == 0:
                    rest //= factor
            if rest == 1:
                return number
            number += 1

    assert all(smooth(number) == least(number) for number in (*range(1, 200), 509, 997, 1001, 2049))
