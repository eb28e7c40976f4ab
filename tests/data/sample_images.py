"""Small files that the tests of data are made of."""

from __future__ import annotations

import io
import struct
import zlib

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


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header announces far more pixels than anyone should unpack."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def silence(seconds: int) -> bytes:
    """A long WAV in little room: one byte a sample, a thousand samples a second."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(1_000 * seconds), 1_000, format="WAV", subtype="PCM_U8")
    return file.getvalue()
