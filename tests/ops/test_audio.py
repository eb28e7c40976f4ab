"""Spectra, their inverse, mel filters and resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openm6.ops.audio import FLOOR, log_mel, mel_filters, overlap_add, resample, smooth, spectrum, unit_window


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "hop"), [(640, 160), (64, 32), (96, 16)])
def test_a_spectrum_brings_its_audio_back(size: int, hop: int) -> None:
    audio = noise(2, 20 * hop)
    window = unit_window(size)
    back = overlap_add(spectrum(audio, window, hop), window, hop)
    assert back.shape == audio.shape
    assert torch.allclose(back, audio, atol=1e-4)


def test_frames_are_those_of_torch_where_the_signal_is_inside() -> None:
    audio, window = noise(1, 1600), unit_window(640)
    ours = spectrum(audio, window, 160)
    # Our frame n begins (640 - 160) / 2 = 240 samples before n·160, so frame 2 begins at sample 80.
    theirs = torch.stft(audio[:, 80:], 640, 160, window=window, center=False, return_complex=True).mT
    assert ours.shape == (1, 10, 321)
    assert torch.allclose(ours[:, 2 : 2 + theirs.shape[1]], theirs, atol=1e-4)


@pytest.mark.parametrize("size", [32, 640, 2048])
def test_white_noise_has_the_same_magnitude_at_any_window(size: int) -> None:
    values = spectrum(0.1 * noise(1, 16 * 2048), unit_window(size), size // 4)
    assert math.isclose(float(values.abs().square().mean().sqrt()), 0.1, rel_tol=0.05)


def test_a_tone_peaks_at_its_frequency_and_in_its_mel_band() -> None:
    time = torch.arange(16000) / 16000
    magnitudes = spectrum(torch.sin(2 * math.pi * 1000 * time)[None], unit_window(640), 160).abs()
    assert (magnitudes[0, 5:-5].argmax(1) == 40).all()  # 1000 Hz · 640 / 16000
    filters = mel_filters(80, 640, 16000)
    loudest = (magnitudes @ filters)[0, 50].argmax()
    frequencies = torch.linspace(0, 8000, 321)
    assert abs(float((filters[:, loudest] * frequencies).sum()) - 1000) < 60


@pytest.mark.parametrize(("mels", "size"), [(80, 640), (5, 32), (320, 2048), (160, 1024)])
def test_every_filter_hears_something_and_averages(mels: int, size: int) -> None:
    filters = mel_filters(mels, size, 16000)
    assert filters.shape == (size // 2 + 1, mels)
    assert (filters >= 0).all()
    assert torch.allclose(filters.sum(0), torch.ones(mels), atol=1e-5)
    centres = (filters * torch.linspace(0, 8000, size // 2 + 1)[:, None]).sum(0)
    assert (centres.diff() >= 0).all()


def test_silence_is_the_floor() -> None:
    filters = mel_filters(10, 64, 16000)
    assert torch.allclose(log_mel(torch.zeros(1, 2, 33), filters), torch.tensor(math.log(FLOOR)))


def sine(rate: int, pitch: float, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * math.pi * pitch * np.arange(round(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize(("old", "new"), [(8000, 16_000), (44_100, 16_000), (48_000, 16_000), (16_000, 22_050)])
@pytest.mark.parametrize("pitch", [100.0, 440.0, 3000.0])
def test_a_sine_stays_the_same_sine(old: int, new: int, pitch: float) -> None:
    found, wanted = resample(sine(old, pitch), old, new), sine(new, pitch)
    assert found.shape == wanted.shape
    inner = slice(new // 20, -new // 20)  # an abrupt start and end ring
    assert np.abs((found - wanted)[inner]).max() < 0.02 and found.dtype == np.float32


def test_what_the_new_rate_cannot_hold_is_removed() -> None:
    mixed = sine(48_000, 440.0) + sine(48_000, 12_000.0)
    found = resample(mixed, 48_000, 16_000)[800:-800]
    assert np.abs(found - sine(16_000, 440.0)[800:-800]).max() < 0.05


def test_the_same_rate_changes_nothing() -> None:
    samples = np.random.default_rng(0).normal(size=100)
    assert np.array_equal(resample(samples, 16_000, 16_000), samples)


@pytest.mark.parametrize(("length", "old", "wanted"), [(1, 8000, 2), (100, 44_100, 37), (1, 48_000, 1)])
def test_lengths_are_rounded_up(length: int, old: int, wanted: int) -> None:
    assert len(resample(np.ones(length, np.float32), old, 16_000)) == wanted


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
