"""Audio signals: short-time spectra and their inverse, mel filters, resampling by cutting or padding a spectrum."""

# Shapes: B batch, S samples, W window, H hop (W a multiple of H), N = S / H frames, K = W/2 + 1 frequencies, M mels

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-4  # noise 80 dB below full scale, with unit windows; lower magnitudes are clamped before the logarithm


def unit_window(size: int) -> Tensor:
    """A Hann window of unit energy: white noise of deviation s has spectral magnitudes of about s at any size.  # W"""
    window = torch.hann_window(size, dtype=torch.float64)
    return (window / window.square().sum().sqrt()).float()


def spectrum(samples: Tensor, window: Tensor, hop: int) -> Tensor:
    """Complex spectrum of S / hop frames of fp32, frame n centred on samples n·hop … (n+1)·hop.  # B S -> B N K"""
    size = window.shape[-1]
    margin = (size - hop) // 2
    frames = F.pad(samples, (margin, size - hop - margin)).unfold(-1, size, hop)  # B S -> B N W
    return torch.fft.rfft(frames * window)


def overlap_add(values: Tensor, window: Tensor, hop: int) -> Tensor:
    """Samples whose `spectrum` is nearest to `values` in the least-squares sense.  # B N K -> B N*H"""
    size = window.shape[-1]
    frames = torch.fft.irfft(values, n=size) * window  # B N K -> B N W
    weight = (window * window).expand(1, frames.shape[1], size)
    margin = (size - hop) // 2
    length = frames.shape[1] * hop
    total = _add_frames(frames, hop)[:, margin : margin + length]
    envelope = _add_frames(weight, hop)[:, margin : margin + length]
    return total / envelope.clamp(min=1e-6)


def _add_frames(frames: Tensor, hop: int) -> Tensor:
    """Add overlapping frames at their offsets.  # B N W -> B (N-1)*H+W"""
    count, size = frames.shape[1], frames.shape[2]
    num_shifts = size // hop
    rows = frames.new_zeros(frames.shape[0], count + num_shifts - 1, hop)
    for shift in range(num_shifts):  # hop by hop, a frame is W/H rows; four slices beat one scatter
        rows[:, shift : shift + count] += frames[:, :, shift * hop : (shift + 1) * hop]
    return rows.flatten(1)


def mel_filters(num_mels: int, size: int, rate: int) -> Tensor:
    """Triangular filters up to rate / 2, even on the mel scale 2595·log10(1 + f/700), each of sum 1.  # K M"""
    frequencies = torch.linspace(0.0, rate / 2, size // 2 + 1, dtype=torch.float64)
    top = 2595.0 * math.log10(1.0 + rate / 2 / 700.0)
    mels = torch.linspace(0.0, top, num_mels + 2, dtype=torch.float64)
    corners = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    rise = (frequencies[:, None] - left) / (peak - left)
    fall = (right - frequencies[:, None]) / (right - peak)
    filters = torch.minimum(rise, fall).clamp(min=0.0)
    # A low filter can be narrower than the grid of frequencies and miss it: it gets its nearest frequency.
    empty = (filters.sum(0) == 0).nonzero()[:, 0]
    filters[(frequencies[:, None] - peak[empty]).abs().argmin(0), empty] = 1.0
    return (filters / filters.sum(0)).float()


def log_mel(magnitudes: Tensor, filters: Tensor) -> Tensor:
    """Natural logarithm of mel-averaged magnitudes, floored.  # B N K -> B N M"""
    return (magnitudes @ filters).clamp(min=FLOOR).log()


def resample(samples: np.ndarray, old_rate: int, new_rate: int) -> np.ndarray:
    """Return the audio at `new_rate`, padded so that the wrap-around falls in silence.  # S -> S·new/old, rounded up"""
    if old_rate == new_rate:
        return samples
    length = len(samples)
    target_length = -(-length * new_rate // old_rate)
    # A whole number of old periods must be a whole number of new ones, or the pitch would shift.
    unit = old_rate // math.gcd(old_rate, new_rate)
    padded = smooth(-(-(length + old_rate // 20) // unit)) * unit
    count = padded * new_rate // old_rate
    # NumPy keeps the plans of its transforms, which torch makes again in each call.
    values = np.fft.rfft(samples.astype(np.float64), padded)[: count // 2 + 1]
    return (np.fft.irfft(values, count) * (count / padded))[:target_length].astype(samples.dtype)


@functools.lru_cache(4096)
def smooth(number: int) -> int:
    """Return the least product of 2, 3 and 5 that is not below a number: a transform of this length is fast."""
    exponents = range(number.bit_length() + 1)
    odd = (3**three * 5**five for three in exponents for five in exponents)
    return min(one << max(0, -(-number // one) - 1).bit_length() for one in odd)
