"""What a sound codec learns from and by: clips kept and changed on the device, multi-scale spectral losses, scores."""

# Letters: B batch, S samples, N clips, L samples of all clips

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from openm6.base.config import Config
from openm6.codecs.audio import SoundCodecConfig
from openm6.codecs.base import Codec, code_bits
from openm6.modalities.audio import read_sound
from openm6.ops.spectrum import FLOOR, log_mel, mel_filters, spectrum, unit_window
from openm6.train.dice import Dice
from openm6.train.sound_augment import colour, noise, play, voices

# Window -> mels (DAC, arXiv 2306.06546).
MEL_SCALES = {32: 5, 64: 10, 128: 20, 256: 40, 512: 80, 1024: 160, 2048: 320}
STFT_WINDOWS = (512, 1024, 2048)


class SoundLessonsConfig(Config):
    """How training sounds are drawn, and what each part of the loss weighs.

    `voices` is the share made by formula; of the rest, `mixed` are two clips at once. Of all, `coloured` come from
    another room and `noisy` carry noise.
    """

    batch: int = Field(default=32, ge=2)
    seconds: float = Field(default=1.0, gt=0.2)
    shares: dict[str, float] = Field(default={})
    voices: float = Field(default=0.2, ge=0, lt=1)
    coloured: float = Field(default=0.6, ge=0, le=1)
    mixed: float = Field(default=0.25, ge=0, le=1)
    noisy: float = Field(default=0.25, ge=0, le=1)
    mel_weight: float = 1.0
    stft_weight: float = 0.5
    complex_weight: float = 0.1
    wave_weight: float = 0.1


@dataclass(frozen=True)
class SoundBank:
    """Clips end to end, where each begins and ends, and how often each is drawn."""

    samples: Tensor  # L
    start: Tensor  # N
    end: Tensor  # N
    weights: Tensor  # N


def make_sound_bank(
    clips: dict[str, list[Tensor]], shares: dict[str, float], device: torch.device
) -> SoundBank:
    """All clips of all sources; a source without a share counts by its seconds."""
    every = [clip for part in clips.values() for clip in part]
    lengths = torch.tensor([len(clip) for clip in every], dtype=torch.float64)
    weights = torch.cat([
        torch.full((len(part),), shares[name] * float(lengths.sum()) / len(part), dtype=torch.float64)
        if name in shares
        else torch.tensor([len(clip) for clip in part], dtype=torch.float64)
        for name, part in clips.items()
    ])  # fmt: skip
    end = lengths.cumsum(0)
    samples = torch.cat(every).to(device)
    return SoundBank(samples, (end - lengths).to(device), end.to(device), weights.to(device))


def read_clip(data: bytes) -> Tensor:
    """An encoded sound as mono samples at 16 kHz.

    Raises:
        DataError: it is broken, empty or too long.
    """
    return torch.from_numpy(np.ascontiguousarray(read_sound(data), np.float32))


class SoundLessons:
    """Draws training sounds on the device; says how far a reconstruction is from them."""

    def __init__(
        self,
        config: SoundLessonsConfig,
        codec: SoundCodecConfig,
        clips: dict[str, list[Tensor]],
        device: torch.device,
    ) -> None:
        self.config = config
        self.device = device
        self.rate = codec.rate
        place = codec.samples_per_place
        self.length = max(1, round(config.seconds * codec.rate / place)) * place
        self.bank = make_sound_bank(clips, config.shares, device)
        self.windows = {size: unit_window(size).to(device) for size in MEL_SCALES}
        self.filters = {size: mel_filters(n, size, codec.rate).to(device) for size, n in MEL_SCALES.items()}

    def draw(self, seed: int) -> Tensor:
        """A batch of sounds within [-1, 1]; the same for the same seed.  # -> B S"""
        dice = Dice(seed, self.device)
        config, length = self.config, self.length
        num_voices = round(config.voices * config.batch)
        count = config.batch - num_voices
        sounds = self._clips(count, dice)
        sounds = sounds + self._clips(count, dice) * dice.chance(config.mixed, count, 1)
        sounds = torch.cat([sounds, voices(num_voices, length, self.rate, dice)])
        is_coloured = dice.chance(config.coloured, len(sounds), 1)
        sounds = torch.where(is_coloured, colour(sounds, self.rate, dice), sounds)
        level = torch.exp(dice.uniform(len(sounds), 1, low=-7.0, high=-2.5))
        hiss = noise(len(sounds), length, self.rate, dice) * level
        sounds = sounds + hiss * dice.chance(config.noisy, len(sounds), 1)
        peak = sounds.abs().amax(1, keepdim=True).clamp(min=1e-3)
        wanted = torch.exp(dice.uniform(len(sounds), 1, low=-2.5, high=-0.05))
        return sounds * torch.where(dice.chance(0.5, len(sounds), 1) | (peak > 1.0), wanted / peak, 1.0)

    def _clips(self, count: int, dice: Dice) -> Tensor:
        """Clips at random speeds, begun at random times: half of them from within.  # -> B S"""
        bank = self.bank
        chosen = torch.multinomial(bank.weights, count, replacement=True, generator=dice.generator)
        start, end = bank.start[chosen], bank.end[chosen]
        speed = torch.exp2(dice.uniform(count, low=-0.5, high=0.5)).double()
        speed = torch.where(dice.chance(0.3, count), torch.ones_like(speed), speed)
        spare = (end - start - self.length * speed).clamp(min=0.0)  # long clips are cut anywhere
        start = start + (spare * dice.uniform(count)).floor()
        room = (self.length - (end - start) / speed).clamp(min=0.0)  # short ones lie anywhere
        begin = (room * dice.uniform(count)).floor()
        return play(bank.samples, start, end, speed, begin, self.length)

    def loss(self, target: Tensor, output: Tensor, settling: bool) -> Tensor:
        """Multi-scale log-mel L1, spectral convergence and log-magnitude, and a little complex and waveform L1.

        The last two alone pin the phase; the codes cannot carry it, so they must stay small.
        """
        config = self.config
        mel = stft = whole = torch.zeros((), device=self.device)
        for size, window in self.windows.items():
            true, guess = (spectrum(x, window, size // 4) for x in (target, output))
            true_size, guess_size = (x.abs() for x in (true, guess))
            filters = self.filters[size]
            mel = mel + F.l1_loss(log_mel(guess_size, filters), log_mel(true_size, filters)) / len(MEL_SCALES)
            if size in STFT_WINDOWS:
                stft = stft + magnitude_difference(true_size, guess_size) / len(STFT_WINDOWS)
                whole = whole + (guess - true).abs().mean() / len(STFT_WINDOWS)
        parts = config.mel_weight * mel + config.stft_weight * stft + config.complex_weight * whole
        return parts + config.wave_weight * F.l1_loss(output, target)


def magnitude_difference(target: Tensor, output: Tensor) -> Tensor:
    """Spectral convergence ‖X - Y‖ / ‖X‖ plus L1 of log magnitudes (arXiv 1910.11480, section 2.2).  # B N K"""
    distance = (output - target).square().sum((1, 2)).add(1e-8).sqrt()
    convergence = (distance / (target.square().sum((1, 2)).add(1e-8).sqrt() + 0.1)).mean()
    return convergence + F.l1_loss(output.clamp(min=FLOOR).log(), target.clamp(min=FLOOR).log())


@torch.no_grad()
def sound_scores(codec: Codec, clips: list[Tensor]) -> dict[str, float]:
    """L1 in nats between the log-mels (80, window 1024) of whole clips before and after, and the bits used a place."""
    device = next(codec.parameters()).device
    window, filters = unit_window(1024).to(device), mel_filters(80, 1024, 16000).to(device)
    distances, places = [], []
    for clip in clips:
        raw = clip[None].to(device)
        codes = codec.encode(raw)
        output = codec.decode(codes)
        raw = F.pad(raw, (0, output.shape[1] - raw.shape[1]))
        true, guess = (log_mel(spectrum(x, window, 160).abs(), filters) for x in (raw, output))
        distances.append((true - guess).abs().mean())
        places.append(codes.flatten(0, -2))
    return {"log_mel_l1": torch.stack(distances).mean().item(), "bits": code_bits(torch.cat(places), codec)}
