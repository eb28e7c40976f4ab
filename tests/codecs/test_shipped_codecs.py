"""The trained codecs that come with the package: small, loadable by name, and as good as the README says."""

from __future__ import annotations

import json

import pytest
import torch

from openm6.codecs.audio import AudioCodec
from openm6.codecs.image import ImageCodec
from openm6.codecs.registry import SHIPPED, load_codec, shipped_codecs
from openm6.data.parquet import EmbeddedConfig
from openm6.data.sources import open_sources
from openm6.train.audio_codec import audio_scores, read_clip
from openm6.train.image_codec import image_scores, read_small, to_pixels


def test_five_codecs_are_shipped_each_a_few_megabytes_with_its_scores() -> None:
    assert shipped_codecs() == ("audio", "audio-mini", "image-256", "image-64", "image-mini")
    for name in shipped_codecs():
        assert (SHIPPED / f"{name}.safetensors").stat().st_size < 8_000_000
        assert set(json.loads((SHIPPED / f"{name}.json").read_text())) >= {"held_out", "test"}


CODECS = {"image-64": (8, 4, 1000, 27.5), "image-256": (16, 2, 1000, 30.5), "image-mini": (8, 2, 1024, 24)}


@pytest.mark.parametrize("name", CODECS)
def test_unseen_emoji_survive(name: str) -> None:
    codec, (grid, groups, size, decibels) = load_codec(name), CODECS[name]
    assert isinstance(codec, ImageCodec) and codec.config.groups == groups and codec.config.codebook_size == size
    source = open_sources({"emoji": EmbeddedConfig(name="emoji")}, "test")["emoji"]
    pixels = to_pixels([read_small(source[index]["image"], 64) for index in range(0, len(source), 4)], 64)
    assert codec.encode(torch.zeros(1, 3, 64, 64)).shape == (1, grid, grid, groups)
    assert image_scores(codec, pixels)["psnr"] > decibels


def test_an_unseen_voice_survives_and_stages_refine() -> None:
    codec = load_codec("audio")
    assert isinstance(codec, AudioCodec) and codec.config.groups == 4 and codec.config.codebook_size == 1000
    source = open_sources({"digits": EmbeddedConfig(name="espeak_digits")}, "test")["digits"]
    clips = [read_clip(source[index]["audio"]) for index in range(0, len(source), 6)]
    assert audio_scores(codec, clips)["log_mel_l1"] < 0.65
    clip = clips[0][None]
    whole = codec.mels(clip[:, : clip.shape[1] // 640 * 640])
    codes = codec.encode(clip)
    errors = [
        float((codec.mels(codec.decode(codes[..., :stages]))[:, : whole.shape[1]] - whole).abs().mean())
        for stages in (1, 2, 4)
    ]
    assert errors == sorted(errors, reverse=True)
