"""The encoder of log-mels: fused as unfused, silence and level, files, and what a masked span may not show."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from openm6.codecs.mel_encoder import CLIP, FRAMES, Convolution, MelEncoder, MelEncoderConfig, loudness
from openm6.codecs.registry import load_codec, load_encoder, save_codec
from openm6.core.errors import CheckpointError, ConfigError, OpenM6Error
from openm6.modalities.audio import Audio, AudioConfig

SMALL = MelEncoderConfig(channels=(4, 6, 8), width=16, dilations=(1, 2), queries=2)


def trained() -> MelEncoder:
    """An encoder whose batch norms have seen inputs."""
    torch.manual_seed(0)
    encoder = MelEncoder(SMALL).train()
    for _ in range(4):
        encoder.features(3 * torch.rand(8, CLIP, 80))
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder() -> MelEncoder:
    found = trained()
    found.fuse()
    return found.requires_grad_(False)


def patches(tokens: int, seed: int = 0) -> np.ndarray:
    """Log-mels of a recording, its last frames silent.  # N 8*M"""
    frames = np.random.default_rng(seed).normal(0, 1, (tokens * FRAMES, 80)).astype(np.float32)
    frames[-4:] = -8.0
    return frames.reshape(tokens, -1)


def test_fused_convolutions_compute_the_same() -> None:
    unfused = trained()
    fused = copy.deepcopy(unfused)
    fused.fuse()
    assert not any(isinstance(one, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d) for one in fused.modules())
    assert sum(isinstance(one, Convolution) for one in fused.modules()) == 6 + 1 + len(SMALL.dilations)
    loud = 3 * torch.rand(2, CLIP, 80)
    assert torch.allclose(fused.features(loud), unfused.features(loud), atol=1e-5)


def test_summaries_are_weighted_means(encoder: MelEncoder) -> None:
    features = encoder.features(3 * torch.rand(3, CLIP, 80))
    queries = encoder.queries
    for clip, found in zip(features, encoder.summaries(features), strict=True):
        scores = queries.weight[:, :, 0] @ clip + queries.bias[:, None]  # type: ignore[index]  # Q N
        expected = (scores.softmax(1)[:, None] * clip).sum(2)  # Q D
        assert torch.allclose(found.T, expected, atol=1e-5)


def test_a_token_is_80_ms_and_neither_level_nor_silence_at_the_end_matter(encoder: MelEncoder) -> None:
    given = patches(6)
    features = encoder(given)
    assert features.shape == (6 + 2, SMALL.width) and features.dtype == np.float16 and np.ptp(features) > 0
    assert np.allclose(encoder(given + 1.0), features, atol=2e-3), "another level"
    followed = np.concatenate([given, np.full((3, given.shape[1]), -8.0, np.float32)])
    assert np.array_equal(encoder(followed)[:6], features[:6])
    assert np.allclose(encoder(followed)[-2:], features[-2:], atol=2e-3), "summaries are of the same clip"
    assert not np.allclose(encoder(patches(6, seed=1)), features, atol=2e-3), "another recording"
    assert float(loudness(torch.from_numpy(given).reshape(-1, 80)).max()) == pytest.approx(3.0)


def test_a_long_recording_is_read_in_one_pass_and_its_beginning_as_that_of_a_clip(encoder: MelEncoder) -> None:
    long = patches(60)
    # Five tokens at each of two distances, and the convolutions before them, reach 7 tokens.
    assert np.allclose(encoder(long)[:20], encoder(np.concatenate([long[:40], long[-1:]]))[:20], atol=2e-2)
    assert len(encoder(long)) == 60 + 2


def test_a_file_holds_the_encoder(encoder: MelEncoder, tmp_path: Path) -> None:
    save_codec(encoder, tmp_path / "own.safetensors", torch.float32)
    again = load_encoder(str(tmp_path / "own.safetensors"), "audio")
    assert np.array_equal(again(patches(5)), encoder(patches(5)))
    assert not again.training and not any(one.requires_grad for one in again.parameters())
    with pytest.raises(CheckpointError, match="holds no codec"):
        load_codec(tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match="holds no image encoder"):
        load_encoder(str(tmp_path / "own.safetensors"), "image")


@pytest.mark.parametrize("name", ["audio-minni", "audio", "/none.safetensors", "hub:x"])
def test_an_unknown_encoder_is_one_sentence(name: str) -> None:
    with pytest.raises(OpenM6Error, match="no encoder .* transformers:NAME or openm6:NAME") as caught:
        load_encoder(name, "audio")
    assert isinstance(caught.value, ConfigError) and "\n" not in str(caught.value)


def test_audio_reads_by_it_and_a_masked_span_does_not_show(encoder: MelEncoder) -> None:
    audio = Audio(load_codec("audio"), AudioConfig(seconds=0.8), encoder)  # type: ignore[arg-type]
    assert audio.encoder is None and audio.patch_size == SMALL.width
    rng = np.random.default_rng(0)
    samples = 0.1 * rng.normal(size=12_800).astype(np.float32)
    segment = audio.source(samples)
    assert segment.arrays["patches"].shape == (10 + 2, SMALL.width)
    assert np.array_equal(audio.source(samples).arrays["patches"], segment.arrays["patches"])
    other = samples.copy()
    other[5_400:7_400] = 0.1 * rng.normal(size=2_000)  # within tokens 4 and 5
    span = {"mask_span": (0.3, 0.7)}
    first, second = (audio.source(one, options=span).arrays for one in (samples, other))
    assert first["is_masked"].tolist() == [False] * 3 + [True] * 4 + [False] * (3 + 2)
    assert np.array_equal(first["patches"], second["patches"])
    assert not np.array_equal(audio.source(other).arrays["patches"], segment.arrays["patches"])
    changed = audio.source(samples, np.random.default_rng(1)).arrays["patches"]
    assert changed.shape[1] == SMALL.width, "a generator asks for augmentation of the log-mels"
