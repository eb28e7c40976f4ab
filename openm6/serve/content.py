"""Inputs of requests as parts for the model, and files of answers.

Messages in OpenAI's form become parts of our modalities. Images and audio are strict base64 or data URLs; only their
headers are read here. Routes that name a task put the input into the task's own prompt.
"""

from __future__ import annotations

import base64
import io
import re
from typing import Annotated, Literal

import numpy as np
import soundfile
from PIL import Image as Pillow
from PIL import ImageOps
from pydantic import BaseModel, Field

from openm6.inference.load import LoadedModel
from openm6.inference.question import chat_prompt
from openm6.modalities.audio import RATE
from openm6.modalities.image import read_image
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries
from openm6.serve.config import Limits
from openm6.serve.errors import BadRequestError, check_limit
from openm6.tasks.chat import join_neighbours
from openm6.tasks.registry import TASKS

ImageFormat = Literal["png", "webp", "jpeg"]
AudioFormat = Literal["wav", "flac", "mp3", "opus", "pcm"]
IMAGE_TYPES: dict[ImageFormat, str] = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
AUDIO_TYPES: dict[AudioFormat, str] = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "pcm": "audio/pcm",
}
READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_SLOT = re.compile(r"\{\w+\}")
_CHINESE = re.compile(r"[\u3400-\u9fff]")


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImageURL(BaseModel):
    """`url` is a data URL, or https on a host that the server allows; `detail` is accepted and changes nothing."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageURL


class InputAudio(BaseModel):
    """`data` is base64 of a file; its own header decides what it is."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg", "opus"] | None = None


class AudioPart(BaseModel):
    type: Literal["input_audio"]
    input_audio: InputAudio


class Series(BaseModel):
    """A column over time; null where nothing was observed."""

    name: str
    values: list[float | None] = Field(min_length=1, max_length=4096)


class NumbersPart(BaseModel):
    """Values of columns, dates as text (null: missing), or a series."""

    type: Literal["numbers"]
    numbers: dict[str, float | str | None] | None = None
    series: Series | None = None


ContentPart = Annotated[TextPart | ImagePart | AudioPart | NumbersPart, Field(discriminator="type")]
Content = str | list[ContentPart]


class Message(BaseModel):
    """One turn. A model that was not trained on chats reads turns one after the other, a line each, without roles."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None


def parts_of_messages(messages: list[Message], limits: Limits, loaded: LoadedModel) -> tuple[Part, ...]:
    """Return the parts of all turns as the model reads them. Raise as below."""
    turns = (
        (
            "system" if message.role == "developer" else message.role,
            _content_parts(message.content or "", limits, f"messages.{index}.content"),
        )
        for index, message in enumerate(messages)
    )
    return _within_limits(chat_prompt(turns, loaded), limits, "messages")


def parts_of_content(content: Content, limits: Limits, param: str) -> tuple[Part, ...]:
    """Return the parts of one turn, neighbouring texts joined; raise BadRequestError if one is broken or too much."""
    return _within_limits(join_neighbours(_content_parts(content, limits, param)), limits, param)


def _content_parts(content: Content, limits: Limits, param: str) -> list[Part]:
    if isinstance(content, str):
        return [Part("text", content)] if content else []
    return [_part(part, limits, f"{param}.{index}") for index, part in enumerate(content)]


def _part(part: ContentPart, limits: Limits, param: str) -> Part:
    if isinstance(part, TextPart):
        return Part("text", part.text)
    if isinstance(part, ImagePart):
        param = f"{param}.image_url.url"
        return Part("image", check_image(decode_data_url(part.image_url.url, param), limits, param))
    if isinstance(part, AudioPart):
        param = f"{param}.input_audio.data"
        return Part("audio", check_audio(decode_base64(part.input_audio.data, param), limits, param))
    if (part.numbers is None) == (part.series is None):
        raise BadRequestError(f"{param} needs either numbers or series", param)
    if part.series is not None:
        return Part("numbers", NumberSeries(part.series.name, part.series.values))
    if not part.numbers:
        raise BadRequestError(f"{param}.numbers must hold at least 1 column", f"{param}.numbers")
    check_limit(f"{param}.numbers", len(part.numbers), limits.columns, "columns")
    return Part("numbers", part.numbers)


def _within_limits(parts: list[Part], limits: Limits, param: str) -> tuple[Part, ...]:
    check_limit(param, len(parts), limits.parts, "parts")
    characters = sum(len(part.raw) for part in parts if part.modality == "text")
    check_limit(param, characters, limits.characters, "characters")
    return tuple(part for part in parts if part.modality != "text" or part.raw or "role" in part.options)


def decode_base64(text: str, param: str) -> bytes:
    """Return the bytes in base64; raise BadRequestError if it has a flaw or is empty."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise BadRequestError(f"{param} is not valid base64: encode the file's bytes again", param) from None
    if not data:
        raise BadRequestError(f"{param} is empty: send the file's bytes", param)
    return data


def decode_data_url(url: str, param: str) -> bytes:
    """Return the bytes in `data:image/png;base64,…`; raise BadRequestError if it is of another kind, or broken."""
    head, comma, body = url.partition(",")
    if not head.startswith("data:") or not comma or not head.endswith(";base64"):
        raise BadRequestError(f"{param} must be a data URL (data:image/png;base64,…): send the bytes along", param)
    return decode_base64(body, param)


def check_image(data: bytes, limits: Limits, param: str) -> bytes:
    """Return the bytes of an image, unchanged; raise BadRequestError if its header is of another format or size."""
    try:
        with Pillow.open(io.BytesIO(data), formats=READABLE) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError):
        raise BadRequestError(f"{param} is not a readable image: send one of {', '.join(READABLE)}", param) from None
    check_limit(param, width * height, limits.pixels, f"pixels ({width} x {height})")
    return data


def check_audio(data: bytes, limits: Limits, param: str) -> bytes:
    """Return the bytes of an audio file, unchanged; raise BadRequestError if it is too long, or no audio."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            seconds = file.frames / file.samplerate
    except (soundfile.LibsndfileError, TypeError, ZeroDivisionError, RuntimeError):
        raise BadRequestError(f"{param} is not readable audio: send WAV, FLAC, Ogg or MP3", param) from None
    check_limit(param, round(seconds, 2), limits.audio_seconds, "seconds")
    return data


CHECKS = {"image": check_image, "audio": check_audio}


def image_file(image: Pillow.Image, form: ImageFormat) -> bytes:
    """Return an image as a file of this format."""
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def image_data_url(image: Pillow.Image, form: ImageFormat = "png") -> str:
    """Return an image as a data URL."""
    return f"data:{IMAGE_TYPES[form]};base64,{base64.b64encode(image_file(image, form)).decode()}"


def audio_file(samples: np.ndarray, form: AudioFormat) -> bytes:
    """Return samples at 16 kHz as a file; `pcm` are 16-bit samples and nothing else."""
    if form == "pcm":
        return pcm(samples).tobytes()
    out = io.BytesIO()
    container, subtype = ("OGG", "OPUS") if form == "opus" else (form.upper(), None)
    soundfile.write(out, samples, RATE, format=container, subtype=subtype)
    return out.getvalue()


def pcm(samples: np.ndarray) -> np.ndarray:
    """Return samples as 16-bit integers."""
    return (np.clip(samples, -1, 1) * 32767).astype("<i2")


def edit_mask(mask: bytes | None, source: bytes, pixels: int) -> np.ndarray | None:
    """Return which pixels may change: those transparent in the mask, or in the image itself without one.  # H W bool

    None without a mask and transparency: all of them may change. Raise BadRequestError if the mask has no transparency,
    or another size than the image, DataError if one of them is broken.
    """
    size = read_image(source, pixels).size
    if mask is None:
        own = _transparent(source)
        return own if own.any() else None
    mask_size = read_image(mask, pixels).size
    if mask_size != size:
        raise BadRequestError(f"mask is {mask_size}, but image is {size}: make them equal in size", "mask")
    found = _transparent(mask)
    if not found.any():
        raise BadRequestError("mask is transparent nowhere: make transparent what may change", "mask")
    return found


def _transparent(data: bytes) -> np.ndarray:
    """Pixels of a valid image that are not fully opaque.  # H W bool"""
    with Pillow.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
    return np.asarray(image.convert("RGBA").getchannel("A")) < 255


def language_of(text: str) -> str:
    """Return `zh` if a text holds a Chinese character, else `en`."""
    return "zh" if _CHINESE.search(text) else "en"


def text_prompt(loaded: LoadedModel, task: str, text: str) -> tuple[Part, ...]:
    """Return a text in the first prompt of a task; it stays as it is if it has the form of one, or without training."""
    prompts = [_SLOT.split(prompt, maxsplit=1) for prompt in TASKS[task].prompts[language_of(text)]]
    worded = any(before and text.startswith(before) and text.endswith(after) for before, after in prompts)
    if worded or task not in {trained_task.task for trained_task in loaded.description.trained_tasks}:
        return (Part("text", text),)
    before, after = prompts[0]
    return (Part("text", before + text + after),)


def part_prompt(task: str, part: Part, language: str = "en", column: str = "") -> tuple[Part, ...]:
    """Return an image, audio or numbers in the first prompt of a task."""
    prompt = TASKS[task].prompts[language][0].replace("{column}", column.replace("_", " "))
    before, after = _SLOT.split(prompt, maxsplit=1)
    parts = [Part("text", before), part, Part("text", after)]
    return tuple(one for one in parts if one is part or one.raw)
