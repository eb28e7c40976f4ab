"""Images and audio for the report: data URLs, spectrograms, and a limit on their bytes."""

# Shapes: S samples, T frames in time, F frequency bands

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from openm6.core.errors import DataError
from openm6.modalities.audio import RATE, read_audio
from openm6.modalities.image import read_image
from openm6.modalities.interface import Part
from openm6.ops.audio import mel_filters

Box = tuple[float, float, float, float]
"""Left, top, right and bottom as fractions of the sides."""
MAX_SIDE = 320  # pixels kept of a larger image
# Pixels on the page of an image's longer side: a multiple of 32 and 64, so that small images stay crisp.
SHOWN_SIDE = 128
MAX_SECONDS = 8.0
WINDOW, BANDS, FRAMES = 512, 48, 120  # of a spectrogram
_COLOURS = np.array([[17, 18, 33], [48, 44, 107], [28, 103, 133], [56, 166, 137], [197, 205, 104], [255, 246, 214]])


@dataclass(frozen=True)
class Media:
    """An image, or audio with its spectrogram as the image; `missing` is the reason if there is neither."""

    caption: str
    image: str = ""
    audio: str = ""
    width: int = 0
    height: int = 0
    enlarged: bool = False
    mask: Box | None = None
    missing: str = ""


@dataclass
class MediaBudget:
    """Encodes images and audio until `limit` bytes are used up; whatever comes later is named, not shown."""

    limit: int
    used: int = 0
    full: bool = False

    def image(self, raw: Any, caption: str, mask: Box | None = None) -> Media:
        """An image from file bytes, a Pillow image or an array, with the box that was masked for the model."""
        if self.full:
            return _left_out(caption)
        try:
            image = read_image(raw)
        except DataError as error:
            return Media(caption, missing=str(error))
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        url = self._data_url("image/png", _png(image))
        if url is None:
            return _left_out(caption)
        scale = SHOWN_SIDE / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        return Media(caption, url, width=width, height=height, enlarged=scale > 1, mask=_clipped(mask))

    def audio(self, raw: Any, caption: str, mask: tuple[float, float] | None = None) -> Media:
        """Audio from file bytes or 16 kHz samples; the span in `mask` is silenced."""
        if self.full:
            return _left_out(caption)
        try:
            samples = read_audio(raw)
        except DataError as error:
            return Media(caption, missing=str(error))
        start, stop = (round(fraction * len(samples)) for fraction in mask or (0, 0))
        position = np.arange(len(samples))
        samples = np.where((position >= start) & (position < stop), 0, samples)[: int(MAX_SECONDS * RATE)]
        image = self._data_url("image/png", _png(spectrogram(samples)))
        audio = self._data_url("audio/wav", _wav(samples))
        if image is None or audio is None:
            return _left_out(caption)
        box = None if mask is None else (start / len(samples), 0.0, stop / len(samples), 1.0)
        return Media(f"{caption}, {len(samples) / RATE:.1f} s", image, audio, mask=_clipped(box))

    def _data_url(self, kind: str, content: bytes) -> str | None:
        """The bytes as a data URL, or None if they no longer fit."""
        self.full = self.full or self.used + len(content) > self.limit
        if self.full:
            return None
        self.used += len(content)
        return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _left_out(caption: str) -> Media:
    return Media(caption, missing="left out to keep this page small")


def _clipped(box: Box | None) -> Box | None:
    if box is None:
        return None
    left, top, right, bottom = (min(1.0, max(0.0, float(fraction))) for fraction in box)
    return left, top, right, bottom


def cut_audio(part: Part) -> Any:
    """The audio as its task cuts it: brought to the length in its options, padded with silence.

    Raises:
        DataError: the audio is broken.
    """
    seconds = part.options.get("seconds")
    if seconds is None:
        return part.raw
    samples = read_audio(part.raw)[: round(seconds * RATE)]
    return np.pad(samples, (0, round(seconds * RATE) - len(samples)))


def spectrogram(samples: np.ndarray) -> Image.Image:
    """Loudness over time and mel frequency.  # S"""
    hop = max(64, len(samples) // FRAMES)
    padded = np.pad(samples, (WINDOW // 2, WINDOW // 2 + hop)).astype(np.float64)
    starts = np.arange(0, len(padded) - WINDOW, hop)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[starts] * np.hanning(WINDOW)  # T WINDOW
    filters = mel_filters(BANDS, WINDOW, RATE).numpy()
    power = np.square(np.abs(np.fft.rfft(frames, axis=1))) @ (filters / filters.max(0))  # T F
    loudness = 10 * np.log10(power.T[::-1] + 1e-8)  # F T, high frequencies first
    # 60 dB below the loudest is black; the lower limit keeps silence from being stretched into noise.
    top = max(float(loudness.max()), -10.0)
    level = np.clip((loudness - top + 60) / 60, 0, 1) * (len(_COLOURS) - 1)
    colours = [np.interp(level, np.arange(len(_COLOURS)), _COLOURS[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(colours, -1).astype(np.uint8)).quantize(64)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _wav(samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format="WAV", subtype="PCM_16")
    return stream.getvalue()
