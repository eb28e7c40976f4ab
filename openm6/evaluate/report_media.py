"""Pictures and sounds as parts of the page itself: data addresses, spectrograms, and a bound on their bytes."""

# Letters: S samples, T frames in time, F bands of frequency

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import soundfile
from PIL import Image as Pillow

from openm6.base.errors import DataError
from openm6.evaluate.report_markup import Markup, quoted, tag
from openm6.modalities.image import read_image
from openm6.modalities.interface import Part
from openm6.modalities.sound import RATE, read_sound

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the side
LARGEST_SIDE = 320  # pixels kept of a larger picture
SHOWN = 128  # pixels on the page of a picture's longer side: 32 and 64 go into it evenly and stay crisp
MOST_SECONDS = 8.0
WINDOW, BANDS, FRAMES = 512, 48, 120  # of a spectrogram
_COLOURS = np.array(
    [[17, 18, 33], [48, 44, 107], [28, 103, 133], [56, 166, 137], [197, 205, 104], [255, 246, 214]]
)


class Media:
    """Puts pictures and sounds on the page until `limit` bytes are used up; what comes later is named, not shown."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.full = False

    def picture(self, raw: Any, caption: str, hole: Box | None = None) -> Markup:
        """A picture from file bytes, a Pillow image or an array, with the box that was hidden from the model."""
        if self.full:
            return _left_out(caption)
        try:
            picture = read_image(raw)
        except DataError as error:
            return _cannot(caption, error)
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        address = self._address("image/png", _png(picture))
        if address is None:
            return _left_out(caption)
        share = SHOWN / max(picture.size)
        width, height = (max(1, round(side * share)) for side in picture.size)
        small = ".tiny" if share > 1 else ""
        about: dict[str, str | float] = {"src": address, "alt": caption, "width": width, "height": height}
        image = tag(f"img{small}", attributes=about)
        veil = None if hole is None else _veil(hole)
        return tag("figure.picture", tag("div.frame", image, veil), tag("figcaption", caption))

    def sound(self, raw: Any, caption: str, gap: tuple[float, float] | None = None) -> Markup:
        """A player with a spectrogram for file bytes or 16 kHz samples; the stretch in `gap` is silent and veiled."""
        if self.full:
            return _left_out(caption)
        try:
            samples = read_sound(raw)
        except DataError as error:
            return _cannot(caption, error)
        start, stop = (round(share * len(samples)) for share in gap or (0, 0))
        place = np.arange(len(samples))
        samples = np.where((place >= start) & (place < stop), 0, samples)[: int(MOST_SECONDS * RATE)]
        view = self._address("image/png", _png(spectrogram(samples)))
        player = self._address("audio/wav", _wav(samples))
        if view is None or player is None:
            return _left_out(caption)
        image = tag("img", attributes={"src": view, "alt": f"spectrogram: {caption}"})
        veil = None if gap is None else _veil((start / len(samples), 0.0, stop / len(samples), 1.0))
        controls = {"controls": "", "preload": "none", "src": player, "aria-label": caption}
        audio = tag("audio", attributes=controls)
        said = f"{caption}, {len(samples) / RATE:.1f} s"
        return tag("figure.sound", tag("div.frame", image, veil), audio, tag("figcaption", said))

    def _address(self, kind: str, content: bytes) -> str | None:
        """The bytes as a data address, or None when they no longer fit."""
        self.full = self.full or self.used + len(content) > self.limit
        if self.full:
            return None
        self.used += len(content)
        return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def heard(part: Part) -> Any:
    """The sound as its task cuts it: brought to the length in its options, with silence after what is shorter.

    Raises:
        DataError: the sound is broken.
    """
    seconds = part.options.get("seconds")
    if seconds is None:
        return part.raw
    samples = read_sound(part.raw)[: round(seconds * RATE)]
    return np.pad(samples, (0, round(seconds * RATE) - len(samples)))


def spectrogram(samples: np.ndarray) -> Pillow.Image:
    """Loudness over time and a frequency axis that is fine below and coarse above, as the ear's.  # S"""
    hop = max(64, len(samples) // FRAMES)
    padded = np.pad(samples, (WINDOW // 2, WINDOW // 2 + hop)).astype(np.float64)
    starts = np.arange(0, len(padded) - WINDOW, hop)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[starts] * np.hanning(WINDOW)  # T WINDOW
    power = np.square(np.abs(np.fft.rfft(frames, axis=1))) @ _bands().T  # T F
    loud = 10 * np.log10(power.T[::-1] + 1e-8)  # F T, high above
    # 60 dB below the loudest is black; the floor keeps silence from being stretched into noise.
    top = max(float(loud.max()), -10.0)
    level = np.clip((loud - top + 60) / 60, 0, 1) * (len(_COLOURS) - 1)
    colours = [np.interp(level, np.arange(len(_COLOURS)), _COLOURS[:, channel]) for channel in range(3)]
    return Pillow.fromarray(np.stack(colours, -1).astype(np.uint8)).quantize(64)


def _bands() -> np.ndarray:
    """Triangles on the mel axis from 0 to 8 kHz.  # F WINDOW/2+1"""
    mels = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), BANDS + 2)
    centres = 700 * (10 ** (mels / 2595) - 1)
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    # A band narrower than a bin would catch nothing: it is widened to one.
    width = np.maximum(np.diff(centres), RATE / WINDOW)
    rise = (bins - centres[1:-1, None]) / width[:-1, None] + 1
    fall = 1 - (bins - centres[1:-1, None]) / width[1:, None]
    return np.clip(np.minimum(rise, fall), 0, None)


def _png(picture: Pillow.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _wav(samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def _veil(box: Box) -> Markup:
    """A hatched cover over a box."""
    left, top, right, bottom = (100 * min(1.0, max(0.0, float(share))) for share in box)
    style = f"left:{left:.2f}%;top:{top:.2f}%;width:{right - left:.2f}%;height:{bottom - top:.2f}%"
    return tag("span.veil", attributes={"style": style})


def _cannot(caption: str, error: DataError) -> Markup:
    return tag("p.missing", f"{caption}: ", quoted(str(error)))


def _left_out(caption: str) -> Markup:
    return tag("p.missing", f"{caption}: left out to keep this page small")
