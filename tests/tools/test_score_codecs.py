"""The measuring of codecs: features that ignore loudness and length, anchors, and the promise about spoken digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openm6.codecs.audio import AudioCodec
from openm6.codecs.registry import load_codec
from openm6.data.parquet import EmbeddedConfig
from tools.score_codecs import audio_report, features, shrunk, timed, vocoded


def tone(pitch: float, seconds: float = 0.5) -> torch.Tensor:
    return 0.3 * torch.sin(2 * math.pi * pitch * torch.arange(int(16000 * seconds)) / 16000)


def test_features_ignore_loudness_and_silence_around_but_hear_the_pitch() -> None:
    clip = tone(500)
    padded = torch.cat([torch.zeros(3000), 0.1 * clip, torch.zeros(5000)])
    other = torch.cat([tone(500, 0.25), tone(900, 0.25)])
    assert features(clip).shape == (40 * 24,)
    assert np.abs(features(padded) - features(clip)).mean() < 0.1
    assert np.abs(features(other) - features(clip)).mean() > 0.2


def test_features_of_silence_are_finite() -> None:
    assert np.isfinite(features(torch.zeros(8000))).all()


def test_shrinking_keeps_plain_colours_and_loses_stripes() -> None:
    plain = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)
    stripes = plain.clone()
    stripes[..., ::2] = 200
    assert shrunk(plain, 8) > 60 and shrunk(stripes, 8) < 15


def test_griffin_lim_keeps_the_pitch_of_a_tone() -> None:
    torch.manual_seed(0)
    back = vocoded(tone(1000))
    peak = torch.fft.rfft(back).abs().argmax() * 16000 / len(back)
    assert float(peak) == pytest.approx(1000, abs=60)


def test_timing_gives_milliseconds() -> None:
    assert 0 < timed(lambda: torch.zeros(10), times=3) < 1000


def test_digits_stay_recognisable_through_the_shipped_codec() -> None:
    codec = load_codec("audio")
    assert isinstance(codec, AudioCodec)
    scores = audio_report(codec, {"digits": EmbeddedConfig(name="espeak_digits")})["digits"]
    assert scores["digits_right_original"] > 0.9
    assert scores["digits_right_codec"] >= 0.9 * scores["digits_right_original"]
