"""Sounds changed and made up on the device: other speeds, rooms, microphones and noise; voices from formulas."""

# Letters: B batch, S samples, K harmonics, F formants, P points of a curve

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.train.dice import Dice

NUM_HARMONICS = 48
NUM_FORMANTS = 5


def curve(points: Tensor, length: int) -> Tensor:
    """A straight-lined curve through evenly spaced points.  # B P -> B S"""
    return F.interpolate(points[:, None], length, mode="linear", align_corners=True)[:, 0]


def play(bank: Tensor, start: Tensor, end: Tensor, speed: Tensor, begin: Tensor, length: int) -> Tensor:
    """Clips of a bank at other speeds (which moves their pitch), each begun `begin` samples late; silence around.

    `bank` holds all clips end to end; clip b is bank[start_b : end_b].  # L, B, B, B, B -> B S
    """
    time = torch.arange(length, device=bank.device)[None, :] - begin[:, None]
    # In double precision: a bank may have more samples than fp32 can count.
    place = start[:, None] + time * speed[:, None]  # B S
    inside = (time >= 0) & (place < end[:, None] - 1)
    low = place.floor().long().clamp(0, len(bank) - 2)
    return torch.lerp(bank[low], bank[low + 1], (place - low).float()) * inside


def colour(sounds: Tensor, rate: int, dice: Dice) -> Tensor:
    """Another microphone and room: a smooth random filter, an echo tail, sometimes only the band up to 4 kHz."""
    count, length = sounds.shape
    size = 2 * length  # room for the tail, or it would wrap around
    bins = size // 2 + 1
    filtered = torch.fft.rfft(sounds, n=size) * torch.exp(0.7 * curve(dice.normal(count, 9), bins))
    frequency = torch.linspace(0.0, rate / 2, bins, device=dice.device)
    narrow = dice.chance(0.3, count, 1) & (frequency > 0.24 * rate)
    filtered = filtered.masked_fill(narrow, 0.0)
    time = torch.arange(length, device=dice.device) / rate
    decay = torch.exp(-time / dice.uniform(count, 1, low=0.02, high=0.2))
    tail = dice.normal(count, length) * decay * 0.03 * dice.chance(0.3, count, 1)
    tail[:, 0] = 1.0
    return torch.fft.irfft(filtered * torch.fft.rfft(tail, n=size), n=size)[:, :length]


def noise(count: int, length: int, rate: int, dice: Dice) -> Tensor:
    """Noise of a random colour that swells and fades.  # -> B S, about unit power"""
    values = torch.fft.rfft(dice.normal(count, length))
    frequency = torch.linspace(0.0, rate / 2, values.shape[1], device=dice.device)
    slope = (1.0 + frequency / 200.0) ** dice.uniform(count, 1, low=-1.2, high=0.2)
    shape = slope * torch.exp(1.0 * curve(dice.normal(count, 12), values.shape[1]))
    sound = torch.fft.irfft(values * shape, n=length)
    sound = sound / sound.square().mean(1, keepdim=True).sqrt().clamp(min=1e-5)
    return sound * curve(dice.uniform(count, 6), length)


def voices(count: int, length: int, rate: int, dice: Dice) -> Tensor:
    """Babble by the source-filter model: harmonics of a gliding pitch under gliding formants, hisses in between.

    The amplitude of harmonic k of pitch f is the sum over formants of 1 / (1 + ((k·f - F) / bandwidth)²).  # -> B S
    """
    points = max(4, 10 * length // rate)
    octaves = dice.uniform(count, 1, low=6.3, high=8.6)
    pitch = torch.exp2(octaves + 0.25 * curve(dice.normal(count, points), length))
    phase = 2.0 * math.pi * torch.cumsum(pitch.double() / rate, 1)  # B S
    number = torch.arange(1, NUM_HARMONICS + 1, device=dice.device, dtype=torch.float64)
    centres = torch.tensor([500.0, 1500.0, 2500.0, 3500.0, 5000.0], device=dice.device)
    stretch = torch.exp2(dice.uniform(count, 1, 1, low=-0.3, high=0.35))
    glide = torch.exp2(0.45 * dice.normal(count, NUM_FORMANTS, points).flatten(0, 1))
    formants = centres[None, :, None] * stretch * curve(glide, length).view(count, NUM_FORMANTS, length)
    width = dice.uniform(count, NUM_FORMANTS, 1, low=50.0, high=220.0)
    gain = torch.exp(-0.6 * torch.arange(NUM_FORMANTS, device=dice.device))[None, :, None]
    sound = torch.zeros(count, length, device=dice.device)
    for k in number.tolist():  # one harmonic at a time: all at once would take gigabytes
        heard = k * pitch  # B S
        level = (gain / (1.0 + ((heard[:, None] - formants) / width).square())).sum(1) / math.sqrt(k)
        sound = sound + torch.sin((phase * k).remainder(2 * math.pi)).float() * level * (heard < 0.48 * rate)
    sound = sound / sound.abs().amax(1, keepdim=True).clamp(min=1e-5)
    voiced = curve(2.5 * dice.normal(count, points) + 1.0, length).clamp(0.0, 1.0)
    hissing = curve(2.5 * dice.normal(count, points) - 2.0, length).clamp(0.0, 1.0)
    return 0.5 * sound * voiced + 0.15 * noise(count, length, rate, dice) * hissing
