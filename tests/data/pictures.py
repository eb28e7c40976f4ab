"""Small files that the tests of data are made of."""

from __future__ import annotations

import io

import numpy as np
import soundfile
from PIL import Image


def png(colour: str = "red", side: int = 8) -> bytes:
    """A square PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def wav(pitch: float = 440.0, seconds: float = 0.1) -> bytes:
    """A WAV of a sine."""
    file = io.BytesIO()
    time = np.arange(int(16_000 * seconds)) / 16_000
    soundfile.write(file, np.sin(2 * np.pi * pitch * time) * 0.5, 16_000, format="WAV", subtype="PCM_16")
    return file.getvalue()
