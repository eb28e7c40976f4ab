"""Pictures and sounds in and out of requests: strict base64, data URLs, and files of the usual formats."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Literal

import numpy as np
import soundfile
from PIL import Image as Pillow

from openm6.modalities.audio import RATE
from openm6.serve.errors import BadRequestError

PictureFormat = Literal["png", "webp", "jpeg"]
SoundFormat = Literal["wav", "flac", "mp3", "opus", "pcm"]
PICTURE_TYPES: dict[PictureFormat, str] = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
SOUND_TYPES: dict[SoundFormat, str] = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "pcm": "audio/pcm",
}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def from_base64(text: str, param: str) -> bytes:
    """The bytes in base64, which must be flawless.

    Raises:
        BadRequestError: it is not, or holds nothing.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequestError(f"{param} is not valid base64: encode the file's bytes anew", param) from None
    if not data:
        raise BadRequestError(f"{param} is empty: send the file's bytes", param)
    return data


def from_data_url(url: str, param: str) -> bytes:
    """The bytes in `data:image/png;base64,…`.

    Raises:
        BadRequestError: it is a URL of another kind, or broken.
    """
    head, comma, body = url.partition(",")
    if not head.startswith("data:") or not comma or not head.endswith(";base64"):
        raise BadRequestError(
            f"{param} must be a data URL (data:image/png;base64,…): send the bytes along", param
        )
    return from_base64(body, param)


def check_picture(data: bytes, pixels: int, param: str) -> bytes:
    """The bytes of a picture whose header is that of an allowed format and size; nothing is unpacked.

    Raises:
        BadRequestError: it is none, or too large.
    """
    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError):
        known = ", ".join(FORMATS)
        raise BadRequestError(f"{param} is no picture that can be read: send one of {known}", param) from None
    if width * height > pixels:
        raise BadRequestError(f"{param} has {width} x {height} pixels, over {pixels:,}: shrink it", param)
    return data


def check_sound(data: bytes, limit: float, param: str) -> bytes:
    """The bytes of a sound whose header can be read and claims no more than `limit` seconds.

    Raises:
        BadRequestError: it is none, or too long.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            seconds = file.frames / file.samplerate
    except (soundfile.LibsndfileError, TypeError, ZeroDivisionError, RuntimeError):
        raise BadRequestError(
            f"{param} is no sound that can be read: send WAV, FLAC, Ogg or MP3", param
        ) from None
    if seconds > limit:
        raise BadRequestError(f"{param} lasts {seconds:.1f} s, over the bound of {limit:g} s: cut it", param)
    return data


def write_picture(picture: Pillow.Image, form: PictureFormat) -> bytes:
    """A picture as a file of this format."""
    out = io.BytesIO()
    picture.save(out, form)
    return out.getvalue()


def write_sound(samples: np.ndarray, form: SoundFormat) -> bytes:
    """Samples at 16 kHz as a file; `pcm` are 16-bit samples and nothing else."""
    if form == "pcm":
        return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    out = io.BytesIO()
    if form == "opus":
        soundfile.write(out, samples, RATE, format="OGG", subtype="OPUS")
    else:
        soundfile.write(out, samples, RATE, format=form.upper())
    return out.getvalue()


def as_data_url(data: bytes, form: PictureFormat) -> str:
    """A file of a picture as a data URL."""
    return f"data:{PICTURE_TYPES[form]};base64,{base64.b64encode(data).decode()}"
