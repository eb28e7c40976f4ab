"""Audio clips for training a codec: kept and augmented on the device; spectral losses, and the scores."""

# Dimensions: B batch, S samples, N clips, L samples of all clips, K harmonics, F formants, P points of a curve

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from openm6.codecs.audio import AudioCodecConfig
from openm6.codecs.base import Codec, TrainableCodec, bits_per_code
from openm6.modalities.audio import read_audio
from openm6.ops.audio import FLOOR, log_mel, mel_filters, spectrum, unit_window
from openm6.train.codec import CodecDataConfig, CodecRecipe, DeviceRng, draw_weights, hold_out, read_records

MEL_SCALES = {32: 5, 64: 10, 128: 20, 256: 40, 512: 80, 1024: 160, 2048: 320}  # window -> mels (DAC, arXiv 2306.06546)
STFT_WINDOWS = (512, 1024, 2048)
MEL_WEIGHT, STFT_WEIGHT, COMPLEX_WEIGHT, WAVE_WEIGHT = 1.0, 0.5, 0.1, 0.1  # of the parts of the loss
NUM_HARMONICS = 48
NUM_FORMANTS = 5


class AudioDataConfig(CodecDataConfig):
    """Fractions: `voices` by formula, of the rest `mixed` of two and `resampled` to another speed and pitch; of all
    `coloured` by a room and `noisy` with noise.
    """

    batch: int = Field(default=32, ge=2)
    seconds: float = Field(default=1.0, gt=0.2)
    voices: float = Field(default=0.2, ge=0, lt=1)
    coloured: float = Field(default=0.6, ge=0, le=1)
    mixed: float = Field(default=0.25, ge=0, le=1)
    resampled: float = Field(default=0.7, ge=0, le=1)
    noisy: float = Field(default=0.25, ge=0, le=1)


class AudioCodecRecipe(CodecRecipe):
    """What `openm6 train` reads if `kind` is `codec-audio`."""

    kind: Literal["codec-audio"] = "codec-audio"
    codec: AudioCodecConfig = AudioCodecConfig()
    data: AudioDataConfig = AudioDataConfig()


def read_clip(data: bytes) -> Tensor:
    """Decode an audio file to mono samples at 16 kHz; raise DataError if it is broken, empty or too long."""
    return torch.from_numpy(np.ascontiguousarray(read_audio(data), np.float32))


class AudioSubject:
    """The subject of an audio codec's training: the `audio` field of its sources."""

    selected_by = ("log_mel_l1", -1)

    def __init__(self, recipe: AudioCodecRecipe, device: torch.device) -> None:
        self.recipe, self.config, self.device = recipe, recipe.data, device
        self.rate = rate = recipe.codec.rate
        step = recipe.codec.samples_per_position
        self.length = max(1, round(self.config.seconds * rate / step)) * step
        self.positions_per_batch = self.config.batch * self.length // step
        kept, self.held_out = hold_out(read_records(recipe.sources, "train", "audio", read_clip), recipe.held_out)
        # All clips end to end, where each begins and ends, and how often each is drawn, by default by its seconds.
        every = [clip for part in kept.values() for clip in part]
        sizes = {name: [len(clip) for clip in part] for name, part in kept.items()}
        lengths = torch.tensor([len(clip) for clip in every], dtype=torch.float64)
        self.samples, self.end = torch.cat(every).to(device), lengths.cumsum(0).to(device)  # L, N
        self.start = self.end - lengths.to(device)  # N
        self.weights = draw_weights(sizes, self.config.source_weights).to(device)  # N
        self.windows = {size: unit_window(size).to(device) for size in MEL_SCALES}
        self.filters = {size: mel_filters(n, size, rate).to(device) for size, n in MEL_SCALES.items()}

    def held_out_scores(self, codec: TrainableCodec) -> dict[str, float]:
        return audio_scores(codec, self.held_out)

    def test_scores(self, codec: TrainableCodec) -> dict[str, dict[str, float]]:
        clips = read_records(self.recipe.sources, "test", "audio", read_clip)
        return {name: audio_scores(codec, part) for name, part in clips.items()}

    def draw(self, seed: int) -> Tensor:
        """Return a batch of clips within [-1, 1]; the same for the same seed.  # -> B S"""
        rng = DeviceRng(seed, self.device)
        config, length = self.config, self.length
        num_voices = round(config.voices * config.batch)
        count = config.batch - num_voices
        waveforms = self._clips(count, rng)
        waveforms = waveforms + self._clips(count, rng) * rng.bernoulli(config.mixed, count, 1)
        if num_voices:  # an FFT of nothing is an error
            waveforms = torch.cat([waveforms, voices(num_voices, length, self.rate, rng)])
        is_coloured = rng.bernoulli(config.coloured, len(waveforms), 1)
        waveforms = torch.where(is_coloured, colour(waveforms, self.rate, rng), waveforms)
        level = torch.exp(rng.uniform(len(waveforms), 1, low=-7.0, high=-2.5))
        hiss = noise(len(waveforms), length, self.rate, rng) * level
        waveforms = waveforms + hiss * rng.bernoulli(config.noisy, len(waveforms), 1)
        peak = waveforms.abs().amax(1, keepdim=True).clamp(min=1e-3)
        target = torch.exp(rng.uniform(len(waveforms), 1, low=-2.5, high=-0.05))
        scaled = rng.bernoulli(0.5, len(waveforms), 1) | (peak > 1.0)
        return waveforms * torch.where(scaled, target / peak, 1.0)

    def _clips(self, count: int, rng: DeviceRng) -> Tensor:
        """Return clips, some at random speeds, that begin at random times.  # -> B S"""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=rng.generator)
        start, end = self.start[chosen], self.end[chosen]
        speed = torch.exp2(rng.uniform(count, low=-0.5, high=0.5)).double()
        speed = torch.where(rng.bernoulli(1 - self.config.resampled, count), torch.ones_like(speed), speed)
        spare = (end - start - self.length * speed).clamp(min=0.0)  # long clips are cut anywhere
        start = start + (spare * rng.uniform(count)).floor()
        slack = (self.length - (end - start) / speed).clamp(min=0.0)  # short ones lie anywhere
        begin = (slack * rng.uniform(count)).floor()
        return play(self.samples, start, end, speed, begin, self.length)

    def loss(self, target: Tensor, output: Tensor, settling: bool) -> Tensor:
        """Return log-mel L1, spectral convergence, log-magnitude; a little L1 for the phase, which codes lack."""
        mel = stft = whole = torch.zeros((), device=self.device)
        for size, window in self.windows.items():
            true, guess = (spectrum(x, window, size // 4) for x in (target, output))
            true_size, guess_size = (x.abs() for x in (true, guess))
            filters = self.filters[size]
            mel = mel + F.l1_loss(log_mel(guess_size, filters), log_mel(true_size, filters)) / len(MEL_SCALES)
            if size in STFT_WINDOWS:
                # Spectral convergence ‖X - Y‖ / ‖X‖ plus L1 of log magnitudes (arXiv 1910.11480, section 2.2).
                distance, scale = (x.square().sum((1, 2)).add(1e-8).sqrt() for x in (guess_size - true_size, true_size))
                convergence = (distance / (scale + 0.1)).mean()
                logs = F.l1_loss(guess_size.clamp(min=FLOOR).log(), true_size.clamp(min=FLOOR).log())
                stft = stft + (convergence + logs) / len(STFT_WINDOWS)
                whole = whole + (guess - true).abs().mean() / len(STFT_WINDOWS)
        parts = MEL_WEIGHT * mel + STFT_WEIGHT * stft + COMPLEX_WEIGHT * whole
        return parts + WAVE_WEIGHT * F.l1_loss(output, target)


@torch.no_grad()
def audio_scores(codec: Codec, clips: list[Tensor]) -> dict[str, float]:
    """Return the L1 (natural log) between log-mels of whole clips before and after, and the bits per position."""
    device = next(codec.parameters()).device
    window, filters = unit_window(1024).to(device), mel_filters(80, 1024, 16000).to(device)
    distances, positions = [], []
    for clip in clips:
        raw = clip[None].to(device)
        codes = codec.encode(raw)
        output = codec.decode(codes)
        raw = F.pad(raw, (0, output.shape[1] - raw.shape[1]))
        true, guess = (log_mel(spectrum(x, window, 160).abs(), filters) for x in (raw, output))
        distances.append((true - guess).abs().mean())
        positions.append(codes.flatten(0, -2))
    return {"log_mel_l1": torch.stack(distances).mean().item(), "bits": bits_per_code(torch.cat(positions), codec)}


def curve(points: Tensor, length: int) -> Tensor:
    """Return a piecewise linear curve through evenly spaced points.  # B P -> B S"""
    return F.interpolate(points[:, None], length, mode="linear", align_corners=True)[:, 0]


def play(bank: Tensor, start: Tensor, end: Tensor, speed: Tensor, begin: Tensor, length: int) -> Tensor:
    """Return clips bank[start : end] at other speeds, `begin` samples late, else silent.  # L, B, B, B, B -> B S"""
    time = torch.arange(length, device=bank.device)[None, :] - begin[:, None]
    # In double precision: a bank may have more samples than fp32 can count.
    position = start[:, None] + time * speed[:, None]  # B S
    inside = (time >= 0) & (position < end[:, None] - 1)
    low = position.floor().long().clamp(0, len(bank) - 2)
    return torch.lerp(bank[low], bank[low + 1], (position - low).float()) * inside


def colour(waveforms: Tensor, rate: int, rng: DeviceRng) -> Tensor:
    """Filter as a microphone and a room do: a smooth random filter, an echo tail, sometimes no band above 4 kHz."""
    count, length = waveforms.shape
    size = 2 * length  # with space for the tail, or it would wrap around
    bins = size // 2 + 1
    filtered = torch.fft.rfft(waveforms, n=size) * torch.exp(0.7 * curve(rng.normal(count, 9), bins))
    frequency = torch.linspace(0.0, rate / 2, bins, device=rng.device)
    narrow = rng.bernoulli(0.3, count, 1) & (frequency > 0.24 * rate)
    filtered = filtered.masked_fill(narrow, 0.0)
    time = torch.arange(length, device=rng.device) / rate
    decay = torch.exp(-time / rng.uniform(count, 1, low=0.02, high=0.2))
    tail = rng.normal(count, length) * decay * 0.03 * rng.bernoulli(0.3, count, 1)
    tail[:, 0] = 1.0
    return torch.fft.irfft(filtered * torch.fft.rfft(tail, n=size), n=size)[:, :length]


def noise(count: int, length: int, rate: int, rng: DeviceRng) -> Tensor:
    """Return noise of a random colour that swells and fades.  # -> B S, about unit power"""
    values = torch.fft.rfft(rng.normal(count, length))
    frequency = torch.linspace(0.0, rate / 2, values.shape[1], device=rng.device)
    slope = (1.0 + frequency / 200.0) ** rng.uniform(count, 1, low=-1.2, high=0.2)
    shape = slope * torch.exp(1.0 * curve(rng.normal(count, 12), values.shape[1]))
    waveform = torch.fft.irfft(values * shape, n=length)
    waveform = waveform / waveform.square().mean(1, keepdim=True).sqrt().clamp(min=1e-5)
    return waveform * curve(rng.uniform(count, 6), length)


def voices(count: int, length: int, rate: int, rng: DeviceRng) -> Tensor:
    """Return babble by the source-filter model: harmonics of a gliding pitch under formants, and hisses.  # -> B S"""
    points = max(4, 10 * length // rate)
    octaves = rng.uniform(count, 1, low=6.3, high=8.6)
    pitch = torch.exp2(octaves + 0.25 * curve(rng.normal(count, points), length))
    phase = 2.0 * math.pi * torch.cumsum(pitch.double() / rate, 1)  # B S
    centers = torch.tensor([500.0, 1500.0, 2500.0, 3500.0, 5000.0], device=rng.device)
    stretch = torch.exp2(rng.uniform(count, 1, 1, low=-0.3, high=0.35))
    glide = torch.exp2(0.45 * rng.normal(count, NUM_FORMANTS, points).flatten(0, 1))
    formants = centers[None, :, None] * stretch * curve(glide, length).view(count, NUM_FORMANTS, length)
    width = rng.uniform(count, NUM_FORMANTS, 1, low=50.0, high=220.0)
    gain = torch.exp(-0.6 * torch.arange(NUM_FORMANTS, device=rng.device))[None, :, None]
    waveform = torch.zeros(count, length, device=rng.device)
    for k in range(1, NUM_HARMONICS + 1):  # one harmonic at a time: all at once would take gigabytes
        harmonic = k * pitch  # B S
        level = (gain / (1.0 + ((harmonic[:, None] - formants) / width).square())).sum(1) / math.sqrt(k)
        audible = harmonic < 0.48 * rate
        waveform = waveform + torch.sin((phase * k).remainder(2 * math.pi)).float() * level * audible
    waveform = waveform / waveform.abs().amax(1, keepdim=True).clamp(min=1e-5)
    voiced = curve(2.5 * rng.normal(count, points) + 1.0, length).clamp(0.0, 1.0)
    hissing = curve(2.5 * rng.normal(count, points) - 2.0, length).clamp(0.0, 1.0)
    return 0.5 * waveform * voiced + 0.15 * noise(count, length, rate, rng) * hissing
