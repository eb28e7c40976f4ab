"""Images and audio for the report: data URLs, spectrograms, and a limit on their bytes."""

# Shapes: S samples, T frames in time, F frequency bands

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soundfile
from PIL import Image

from openm6.core.errors import DataError
from openm6.modalities.audio import RATE, read_audio
from openm6.modalities.image import read_image
from openm6.modalities.interface import Part
from openm6.ops.audio import mel_filters

MAX_SIDE = 320  # pixels kept of a larger image
# Pixels on the page of an image's longer side: a multiple of 32 and 64, so that small images stay crisp.
SHOWN_SIDE = 128
MAX_SECONDS = 8.0
WINDOW, BANDS, FRAMES = 512, 48, 120  # of a spectrogram
_COLOURS = np.array([[17, 18, 33], [48, 44, 107], [28, 103, 133], [56, 166, 137], [197, 205, 104], [255, 246, 214]])


@dataclass(frozen=True)
class Media:
    """An image, or audio with its spectrogram as the image; `missing` is the reason if there is neither.

    mask: left, top, right and bottom as fractions of the sides.
    """

    caption: str
    image: str = ""
    audio: str = ""
    width: int = 0
    height: int = 0
    enlarged: bool = False
    mask: tuple[float, float, float, float] | None = None
    missing: str = ""


@dataclass
class MediaBudget:
    """Encodes images and audio until `limit` bytes are used up; whatever comes later is named, not shown."""

    limit: int
    used: int = 0
    full: bool = False

    def add(self, part: Part, caption: str) -> Media:
        """An image or audio with what was masked for the model; audio is as long as its options ask for."""
        show = self._image if part.modality == "image" else self._audio
        try:
            media = None if self.full else show(part, caption)
        except DataError as error:
            return Media(caption, missing=str(error))
        return Media(caption, missing="left out to keep this page small") if media is None or self.full else media

    def _image(self, part: Part, caption: str) -> Media:
        image = read_image(part.raw)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        url = self._data_url("image/png", lambda stream: image.save(stream, "PNG", optimize=True))
        scale = SHOWN_SIDE / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        mask = part.options.get("mask_box")
        return Media(caption, url, width=width, height=height, enlarged=scale > 1, mask=mask)

    def _audio(self, part: Part, caption: str) -> Media:
        samples, seconds, span = read_audio(part.raw), part.options.get("seconds"), part.options.get("mask_span")
        if seconds is not None:
            samples = samples[: round(seconds * RATE)]
            samples = read_audio(np.pad(samples, (0, round(seconds * RATE) - len(samples))))  # refuses an empty one
        start, stop = (round(fraction * len(samples)) for fraction in span or (0, 0))
        position = np.arange(len(samples))
        samples = np.where((position >= start) & (position < stop), 0, samples)[: int(MAX_SECONDS * RATE)]
        drawn = spectrogram(samples)
        image = self._data_url("image/png", lambda stream: drawn.save(stream, "PNG", optimize=True))
        audio = self._data_url(
            "audio/wav", lambda stream: soundfile.write(stream, samples, RATE, "PCM_16", format="WAV")
        )
        left, right = (min(1.0, end / len(samples)) for end in (start, stop))
        mask = None if span is None else (left, 0.0, right, 1.0)
        return Media(f"{caption}, {len(samples) / RATE:.1f} s", image, audio, mask=mask)

    def _data_url(self, kind: str, write: Callable[[io.BytesIO], None]) -> str:
        """A file as a data URL; empty if it does not fit any more."""
        stream = io.BytesIO()
        write(stream)
        content = stream.getvalue()
        self.full = self.full or self.used + len(content) > self.limit
        if self.full:
            return ""
        self.used += len(content)
        return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


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
