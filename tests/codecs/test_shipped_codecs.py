"""The trained codecs that come with the package: small, loadable by name, and as good as the README says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import openm6
from openm6.codecs.audio import AudioCodec
from openm6.codecs.external import Encoder
from openm6.codecs.image import ImageCodec
from openm6.codecs.mel_encoder import MelEncoder
from openm6.codecs.pixel_encoder import PixelEncoder
from openm6.codecs.registry import SHIPPED, load_codec, load_encoder, shipped_codecs, shipped_encoders
from openm6.data.parquet import EmbeddedConfig
from openm6.data.sources import open_sources
from openm6.modalities.audio import Audio, AudioConfig, read_audio
from openm6.modalities.image import Image, ImageConfig, read_image
from openm6.train.audio_codec import audio_scores, read_clip
from openm6.train.image_codec import image_scores, read_small, to_pixels


def test_five_codecs_are_shipped_each_a_few_megabytes_with_its_scores() -> None:
    assert shipped_codecs() == ("audio", "audio-mini", "image-256", "image-64", "image-mini")
    for name in shipped_codecs():
        assert (SHIPPED / f"{name}.safetensors").stat().st_size < 8_000_000
        assert set(json.loads((SHIPPED / f"{name}.json").read_text())) >= {"held_out", "test"}


ATTRIBUTES = {
    "beard", "earrings", "family", "glasses", "hair", "hair colour", "hairAccessories", "hat", "head", "mood", "shirt",
    "skin",
}  # fmt: skip
SCORES = {
    "audio-mini": {"word", "syllable", "tone", "instrument", "pitch", "recording"},
    "image-mini": {"name", "style", "digit"} | ATTRIBUTES,
}


@pytest.mark.parametrize(
    ("name", "kind", "size"), [("audio-mini", MelEncoder, 2_000_000), ("image-mini", PixelEncoder, 3_100_000)]
)
def test_a_shipped_encoder_is_small_and_comes_with_its_scores(name: str, kind: type[Encoder], size: int) -> None:
    encoder = load_encoder(name, name.partition("-")[0])
    assert isinstance(encoder, kind) and encoder.width == 192
    file = SHIPPED / f"{name}-encoder.safetensors"
    assert file.stat().st_size < size
    scores = json.loads(file.with_suffix(".json").read_text())["accuracy"]["test"]
    assert set(scores) == SCORES[name]


def test_two_encoders_are_shipped() -> None:
    assert shipped_encoders() == ("audio-mini", "image-mini")


def test_the_encoder_of_images_reads_a_brighter_icon_as_the_same_and_others_as_others() -> None:
    image = Image(load_codec("image-mini"), ImageConfig(), load_encoder("image-mini", "image"))
    mini = Path(openm6.__file__).parent / "shipped" / "mini"
    names = ("things-phosphor-light-crown", "things-phosphor-regular-robot", "avatars-avatar-pixel-art-3")
    files = [(mini / f"{name}.png").read_bytes() for name in names]
    vectors = [image.source(raw).arrays["patches"].astype(np.float32).mean(0) for raw in files]
    brighter = 255 - (0.9 * (255 - np.asarray(read_image(files[0]), np.float32))).astype(np.uint8)
    again = image.source(brighter).arrays["patches"].astype(np.float32).mean(0)
    distances = [float(np.linalg.norm(again - one)) for one in vectors]
    assert distances[0] < min(distances[1:])


def test_the_shipped_encoder_reads_a_quieter_word_as_the_same_and_other_words_as_others() -> None:
    encoder = load_encoder("audio-mini", "audio")
    audio = Audio(load_codec("audio-mini"), AudioConfig(), encoder)  # type: ignore[arg-type]
    mini = Path(openm6.__file__).parent / "shipped" / "mini"
    names = ("espeak-f4-en-robot", "espeak-f4-zh-robot", "espeak-f4-en-banana", "flite-rms-en-butterfly")
    files = [(mini / f"words-word-{name}.flac").read_bytes() for name in names]
    vectors = [audio.source(raw).arrays["patches"].astype(np.float32).mean(0) for raw in files]
    quieter = audio.source(0.3 * read_audio(files[0])).arrays["patches"].astype(np.float32).mean(0)
    distances = [float(np.linalg.norm(quieter - one)) for one in vectors]
    assert 10 * distances[0] < min(distances[1:])


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
