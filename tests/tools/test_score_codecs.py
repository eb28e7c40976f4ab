"""The measuring of codecs: the scores of the docs, and spoken digits that stay recognizable."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.svm import SVC

from openm6.codecs.audio import AudioCodec
from openm6.codecs.registry import load_codec
from openm6.ops.audio import log_mel, mel_filters, spectrum, unit_window
from openm6.train.audio_codec import read_clip
from tools.score_codecs import main, records_of


def test_the_scores_are_those_beside_the_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.score_codecs.IMAGES", ("countries",))
    main(["image-64", "audio"])
    found = json.loads(capsys.readouterr().out)
    assert found["image-64"]["countries"]["psnr"] == pytest.approx(28.4, abs=0.05)
    assert found["audio"]["espeak_digits"]["log_mel_l1"] == pytest.approx(0.58, abs=0.005)


def features(clip: torch.Tensor) -> np.ndarray:
    """Log-mels of the part that is not silent, scaled to one loudness and to 24 frames.  # S -> M·F"""
    loud = (clip.abs() > 0.02 * clip.abs().max()).nonzero()[:, 0]
    heard = clip[loud[0] : loud[-1] + 1]
    heard = heard * (0.1 / heard.square().mean().sqrt().clamp(min=1e-5))
    magnitudes = spectrum(F.pad(heard, (0, -len(heard) % 160))[None], unit_window(640), 160).abs()
    mels = log_mel(magnitudes, mel_filters(40, 640, 16000)).clamp(min=-6.0)  # 1 N M
    even = F.interpolate(mels.mT, 24, mode="linear", align_corners=True)[0]  # M F
    return (even - even.mean(1, keepdim=True)).flatten().numpy()


def test_digits_stay_recognizable_through_the_shipped_codec() -> None:
    codec = load_codec("audio")
    assert isinstance(codec, AudioCodec)
    train, test = records_of("espeak_digits", "train"), records_of("espeak_digits", "test")
    words = [[f"{one['label']} {one['extra']['spoken_language']}" for one in own] for own in (train, test)]
    classifier = SVC(C=10).fit([features(read_clip(one["audio"])) for one in train], words[0])
    clips = [read_clip(one["audio"]) for one in test]
    copies = [codec.decode(codec.encode(clip[None]))[0, : len(clip)] for clip in clips]
    original, copied = (classifier.score([features(one) for one in own], words[1]) for own in (clips, copies))
    assert original > 0.9 and copied >= 0.9 * original, (original, copied)
