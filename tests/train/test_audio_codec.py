"""Training audio clips and audio losses: repeatable, in range, and pulling the right way."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch

from openm6.codecs.audio import AudioCodec, AudioCodecConfig
from openm6.train.audio_codec import (
    AudioCodecRecipe,
    AudioSubject,
    audio_scores,
    colour,
    curve,
    noise,
    play,
    read_clip,
    voices,
)
from openm6.train.codec import DeviceRng, draw_weights

CPU = torch.device("cpu")
CODEC = AudioCodecConfig(width=16, encoder_blocks=1, decoder_blocks=1, latent=6)


def wav(seconds: float, pitch: float = 440.0, rate: int = 16000) -> bytes:
    buffer = io.BytesIO()
    time = np.arange(int(seconds * rate)) / rate
    soundfile.write(buffer, 0.3 * np.sin(2 * np.pi * pitch * time), rate, format="WAV")
    return buffer.getvalue()


def clips(*files: bytes) -> list[torch.Tensor]:
    return [read_clip(data) for data in files]


@pytest.fixture(scope="module")
def subject() -> AudioSubject:
    recipe = AudioCodecRecipe.model_validate({
        "sources": {"digits": {"kind": "embedded", "name": "espeak_digits", "limit": 8}},
        "codec": CODEC, "data": {"batch": 6, "seconds": 0.4}, "held_out": 4,
    })  # fmt: skip
    return AudioSubject(recipe, CPU)


def test_a_seed_gives_the_same_batch_within_range(subject: AudioSubject) -> None:
    first = subject.draw(1)
    assert first.shape == (6, 6400) and torch.isfinite(first).all() and first.abs().max() <= 1
    assert torch.equal(first, subject.draw(1))
    assert not torch.equal(first, subject.draw(2))
    assert (first.abs().amax(1) > 1e-3).all()


def test_clips_count_by_their_seconds_unless_their_source_has_a_weight() -> None:
    sizes = {"a": [3200], "b": [9600, 3200]}
    assert draw_weights(sizes, {}).tolist() == [3200, 9600, 3200]
    shared = draw_weights(sizes, {"a": 0.5, "b": 0.5})
    assert float(shared[0]) == pytest.approx(float(shared[1:].sum()))


def test_clips_lie_end_to_end(subject: AudioSubject) -> None:
    assert subject.start[0] == 0 and subject.end[-1] == len(subject.samples)
    assert torch.equal(subject.start[1:], subject.end[:-1]) and torch.equal(
        subject.weights, subject.end - subject.start
    )


def test_playing_at_speed_one_copies_and_at_speed_two_skips() -> None:
    bank = torch.arange(100.0)
    bounds = (torch.tensor([10.0, 10.0]).double(), torch.tensor([30.0, 30.0]).double())
    out = play(bank, *bounds, torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 0.0]).double(), 40)
    assert out[0, :3].tolist() == [0, 0, 0] and out[0, 3:22].tolist() == list(range(10, 29))
    assert out[0, 22:].abs().sum() == 0
    assert out[1, :10].tolist() == list(range(10, 30, 2)) and out[1, 10:].abs().sum() == 0


def test_a_curve_goes_through_its_points() -> None:
    points = torch.tensor([[0.0, 2.0, 1.0]])
    assert curve(points, 5)[0].tolist() == [0.0, 1.0, 2.0, 1.5, 1.0]


def test_voices_are_audio_with_a_pitch_and_noise_has_unit_power_at_most() -> None:
    made = voices(4, 16000, 16000, DeviceRng(0, CPU))
    assert made.shape == (4, 16000) and torch.isfinite(made).all()
    assert (made.square().mean(1).sqrt() > 0.005).all() and made.abs().max() < 3
    hiss = noise(4, 8000, 16000, DeviceRng(0, CPU))
    assert (hiss.square().mean(1) < 1.05).all() and (hiss.square().mean(1) > 0.02).all()


def test_colouring_changes_the_spectrum_and_not_the_length() -> None:
    audio_clips = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)) * 0.1
    changed = colour(audio_clips, 16000, DeviceRng(1, CPU))
    assert changed.shape == audio_clips.shape and torch.isfinite(changed).all()
    assert not torch.allclose(changed, audio_clips, atol=1e-2)


def test_the_loss_is_zero_for_a_copy_and_orders_errors(subject: AudioSubject) -> None:
    target = subject.draw(5)
    static = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    losses = [float(subject.loss(target, target + size * static, False)) for size in (0.0, 0.001, 0.05)]
    assert losses[0] == pytest.approx(0.0, abs=1e-3)
    assert losses[0] < losses[1] < losses[2]


def test_a_tone_of_another_pitch_costs_more_than_one_of_another_phase(subject: AudioSubject) -> None:
    time = torch.arange(6400) / 16000
    tone, late, high = (torch.sin(6.2832 * f * time + p)[None] * 0.3 for f, p in ((440, 0), (440, 1), (700, 0)))
    assert subject.loss(tone, late, False) < 0.5 * subject.loss(tone, high, False)


def test_the_loss_has_a_finite_gradient_at_silence(subject: AudioSubject) -> None:
    output = torch.zeros(2, 6400, requires_grad=True)
    subject.loss(torch.zeros(2, 6400), output, False).backward()
    assert output.grad is not None and torch.isfinite(output.grad).all()


def test_scores_are_finite_and_worse_for_an_untrained_codec_than_for_none() -> None:
    torch.manual_seed(0)
    codec = AudioCodec(CODEC).eval()
    scores = audio_scores(codec, clips(wav(0.33), wav(0.2)))
    assert scores["log_mel_l1"] > 0.1 and 0 < scores["bits"] <= 40
