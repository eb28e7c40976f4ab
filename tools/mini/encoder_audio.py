"""Recordings of the corpus that the encoder of audio is trained to classify.

Classes are words, syllables with their tones, instruments, pitches and named recordings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.codecs.audio import AudioCodecConfig, LogMels
from openm6.codecs.mel_encoder import CLIP, MelEncoder, MelEncoderConfig, loudness
from openm6.codecs.registry import load_codec
from openm6.data.parquet import ParquetConfig
from openm6.data.records import Record
from openm6.data.source import Split
from openm6.data.sources import open_sources
from openm6.modalities.audio import RATE, read_audio
from tools.mini.labelled import Heads, numbered
from tools.mini.networks import split_tone

# Letters: B clips, S samples, F frames of 10 ms, M mels

SPEECH = ("words", "more_words", "said_words", "syllables", "more_syllables")
CODEC = "audio-mini"
CODED = 0.3  # of the clips are read after the codec, as those that `mini` generates
REVERBERANT = 0.3  # of the clips of speech are read as in a room
BATCH = 64


def classes_of(part: str, record: Record) -> dict[str, str]:
    """Return the classes of a recording by what they say of it."""
    if part.endswith("words"):
        language = record["extra"]["spoken_language"]
        return {"word": f"{language} {record['label'] if language == 'en' else record['label_zh']}"}
    if part.endswith("syllables"):
        syllable, tone = split_tone(record["label"])
        return {"syllable": syllable, "tone": tone}
    if part == "instruments":
        pitch = (record.get("numbers") or {}).get("pitch")  # drums have none
        return {"instrument": record["label"]} | ({} if pitch is None else {"pitch": f"{pitch:g}"})
    return {"recording": record["label"]}


class LabelledAudio:
    """The clips of a split: how loud they are, their parts, and the numbers of their classes by head."""

    WEIGHTS: ClassVar[Mapping[str, float]] = {
        "words": 2.0, "more_words": 2.0, "said_words": 2.0, "syllables": 0.8, "more_syllables": 0.8,
        "instruments": 2.2, "recordings": 2.0,
    }  # fmt: skip

    def __init__(self, corpus: Path, split: Split, heads: Heads | None = None) -> None:
        width = CLIP * RATE // 100
        clips: list[np.ndarray] = []
        self.parts: list[str] = []
        classes: list[dict[str, str]] = []
        for part in self.WEIGHTS:
            source = open_sources({part: ParquetConfig(path=str(corpus / f"{part}.parquet"))}, split)[part]
            for index in range(len(source)):
                record = source[index]
                samples = read_audio(record["audio"])[:width]
                clips.append(np.pad(samples, (0, width - len(samples))).astype(np.float16))
                self.parts.append(part)
                classes.append(classes_of(part, record))
        self.loudness, self.coded = loudness_of(np.stack(clips), coded=split == "train")
        self.heads, self.classes = numbered(classes, heads)
        self.is_speech = torch.tensor([part in SPEECH for part in self.parts])

    @staticmethod
    def encoder() -> MelEncoder:
        return MelEncoder(MelEncoderConfig())

    def inputs(self, rows: Tensor) -> Tensor:
        return self.loudness[rows].float()

    def changed(self, rows: Tensor, rng: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return clips as others would be; notes of another pitch have lost that of their class."""
        loud = self.inputs(rows)
        if self.coded is not None:
            is_coded = torch.rand(len(rows), generator=rng) < CODED
            loud = torch.where(is_coded[:, None, None], self.coded[rows].float(), loud)
        loud, bent = changed(loud, self.is_speech[rows], rng)
        return loud, {"pitch": bent}


@torch.inference_mode()
def loudness_of(clips: np.ndarray, coded: bool) -> tuple[Tensor, Tensor | None]:
    """How loud clips are, and if asked for how loud they are after the codec.  # B S -> B F M, B F M"""
    mels, codec = LogMels(AudioCodecConfig()), load_codec(CODEC) if coded else None
    plain: list[Tensor] = []
    after: list[Tensor] = []
    for start in range(0, len(clips), BATCH):
        samples = torch.from_numpy(clips[start : start + BATCH]).float()
        plain.append(loudness(mels(samples)).half())
        if codec is not None:
            with torch.autocast("cpu", torch.bfloat16):
                samples = codec.decode(codec.encode(samples))
            after.append(loudness(mels(samples.float())).half())
    return torch.cat(plain), torch.cat(after) if after else None


def reverberated(loud: Tensor, decay: Tensor, wet: Tensor) -> Tensor:
    """Clips of which each value leaves a tail, `wet` below it, that falls by `decay` per frame.  # B F M -> B F M"""
    fall = decay * torch.arange(loud.shape[1])[:, None]
    return torch.maximum(loud, (loud + fall).cummax(1).values - fall - wet)


def changed(loud: Tensor, is_speech: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips as others would be, and which of the notes have another pitch than before.  # B F M -> B F M, B"""
    count, frames, mels = loud.shape

    def uniform(low: float, high: float, *sizes: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *sizes, generator=rng)

    def normal(deviation: float, *sizes: int) -> Tensor:
        return deviation * torch.randn(count, *sizes, generator=rng)

    bent = uniform(0, 1) < 0.5
    reach = torch.where(is_speech, uniform(0, 1), bent * uniform(0, 0.35))
    # Another size of the vocal tract and another tempo, after some silence or without the first 20 ms.
    time = (torch.arange(frames) - uniform(-2, 12, 1)) * torch.exp(uniform(-0.28, 0.28) * reach)[:, None]
    mel = torch.arange(mels) * torch.exp(uniform(-0.2, 0.2) * reach)[:, None]
    across = ((2 * mel + 1) / mels - 1)[:, None].expand(-1, frames, -1)
    down = ((2 * time + 1) / frames - 1)[:, :, None].expand(-1, -1, mels)
    found = F.grid_sample(loud[:, None], torch.stack((across, down), 3), align_corners=False)[:, 0]
    # RT60, the time in which audio falls by 60 dB (2.3 units of three nepers), is 0.15 to 0.7 s.
    decay, wet = 0.023 / uniform(0.15, 0.7, 1, 1), uniform(0.15, 0.8, 1, 1)
    has_tail = is_speech & (uniform(0, 1) < REVERBERANT)
    found = torch.where(has_tail[:, None, None], reverberated(found, decay, wet), found)
    # The response of a microphone, level, noise, and a floor of noise in some.
    extent = 0.3 + reach[:, None, None]
    response = F.interpolate(normal(0.22, 1, 6), size=mels, mode="linear", align_corners=True)
    response = response + torch.linspace(-1, 1, mels) * normal(0.35, 1, 1)
    found = (
        found
        + (found > 0) * (extent * response + normal(0.15, 1, 1))
        + normal(0.12, frames, mels) * uniform(0, 1, 1, 1)
    )
    floor = uniform(0, 0.5, 1, 1) * (uniform(0, 1, 1, 1) < 0.3)
    found = torch.maximum(found, floor + normal(0.1, frames, mels)).clamp(min=0)
    # SpecAugment (arXiv 1904.08779).
    for axis, size, span, most in ((2, mels, 1.0, 14), (1, frames, 0.6, 10)):
        start, width = uniform(0, span * size, 1), uniform(0, most, 1) * reach[:, None]
        at = torch.arange(size)
        kept = ~((at >= start) & (at < start + width))
        found = found * (kept[:, None] if axis == 2 else kept[:, :, None])
    return found, bent & ~is_speech
