"""What goes into a model and comes out of it in Python: media, chat messages, audio clips, predicted numbers."""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import soundfile

from openm6.core.errors import ConfigError, DataError
from openm6.core.files import check_writable, replace_bytes
from openm6.inference.load import LoadedModel
from openm6.inference.question import chat_prompt, read_media
from openm6.modalities.audio import RATE
from openm6.modalities.histogram import Histogram
from openm6.modalities.image import in_rgb, upright
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries

ROLES = ("system", "developer", "user", "assistant")
# Files that `write_answer` makes, the default first.
SUFFIXES = {"image": (".png", ".jpg", ".jpeg", ".webp"), "audio": (".wav", ".flac", ".ogg")}
# Of Pillow images, those that a PNG keeps as they are.
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
# Of a part of a message, the keys that may hold its image or audio; then types of OpenAI, with the key of the content.
MEDIA = ("image", "audio")
OPENAI = {"image_url": ("image", "url"), "input_audio": ("audio", "data")}


@dataclass(frozen=True, eq=False)
class Audio:
    """An audio clip: samples from -1 to 1, and how many there are per second.

    >>> clip = m6.generate("say zero", output="audio", num_inference_steps=2)
    >>> clip.sampling_rate, clip.array.ndim
    (16000, 1)
    >>> clip.save("zero.wav")
    """

    array: np.ndarray  # samples
    sampling_rate: int = RATE

    def to_bytes(self, suffix: str = ".wav") -> bytes:
        """Return a file of the format that a suffix names: .wav, .flac or .ogg."""
        if suffix.lower() not in SUFFIXES["audio"]:
            raise ConfigError(f"audio is not written as {suffix or 'a file without suffix'!r}: use .wav, .flac or .ogg")
        buffer = io.BytesIO()
        try:
            soundfile.write(buffer, np.asarray(self.array), self.sampling_rate, format=suffix[1:].lower())
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"the audio cannot be written ({error}): give samples from -1 to 1 as an array") from None
        return buffer.getvalue()

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.to_bytes()).decode()
        return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'

    def save(self, path: Path | str) -> None:
        """Write a .wav, .flac or .ogg file, whole or not at all.

        Raises:
            ConfigError: another suffix.
            OutputError: the file cannot be written.
        """
        replace_bytes(Path(path), self.to_bytes(Path(path).suffix))


class Distribution:
    """A predicted number, or the steps of a forecast, in the units of its column.

    `mean`, `median` and what the methods return are a float for a number, and an array of H values for H steps.

    >>> weight = m6.generate(numbers={"bill_length_mm": 40, "body_mass_g": None}, output="numbers")
    >>> weight.quantile(0.1) <= weight.median <= weight.quantile(0.9)
    True
    """

    def __init__(self, name: str, histogram: Histogram, is_series: bool = False) -> None:
        self.name, self.histogram, self.is_series = name, histogram, is_series
        self.mean, self.median = self._plain(histogram.mean()), self._plain(histogram.median())

    def quantile(self, level: float) -> Any:
        """Return the value below which a fraction `level` of the mass lies.  # -> float, or H"""
        if not isinstance(level, float | int | np.number) or not 0 < level < 1:
            raise ConfigError(f"the quantile level {level!r} must lie between 0 and 1")
        return self._plain(self.histogram.quantile(level))

    def interval(self, coverage: float = 0.8) -> tuple[Any, Any]:
        """Return the ends of the central interval that should hold a fraction `coverage` of the true values."""
        return self.quantile((1 - coverage) / 2), self.quantile((1 + coverage) / 2)

    def summary(self) -> dict[str, Any]:
        """Return mean, median and the ends of the interval of 80 %, to five digits, as plain numbers or lists."""
        low, high = self.interval(0.8)
        found = {"mean": self.mean, "median": self.median, "low_80": low, "high_80": high}
        rounded = {name: [float(f"{one:.5g}") for one in np.atleast_1d(values)] for name, values in found.items()}
        return {name: values[0] if len(values) == 1 else values for name, values in rounded.items()}

    def __repr__(self) -> str:
        return f"Distribution({self.name!r}, {self.summary()})"

    def _plain(self, values: np.ndarray) -> Any:
        return values if self.is_series else float(values[0])


def check_file(out: Path | None, output: str) -> Path | None:
    """Return the file for an answer, of an image or audio by default answer.png or .wav; ConfigError if it is none."""
    suffixes = SUFFIXES.get(output, ())
    if suffixes:
        out = out or Path(f"answer{suffixes[0]}")
        if out.suffix.lower() not in suffixes:
            raise ConfigError(f"--out {out} must end in one of {', '.join(suffixes)} for --output {output}")
    if out is not None:
        check_writable(out, "--out")
    return out


def write_answer(answer: Any, file: Path | None) -> str:
    """Write an answer to its file, if there is one, and return what is to be printed."""
    if isinstance(answer, PIL.Image.Image | Audio):
        assert file is not None
        suffix = file.suffix.lower()
        if isinstance(answer, Audio):
            answer.save(file)
        else:
            buffer = io.BytesIO()
            answer.save(buffer, PIL.Image.registered_extensions()[suffix])
            replace_bytes(file, buffer.getvalue())
        return f"wrote {file}"
    shown = answer if isinstance(answer, str) else json.dumps({answer.name: answer.summary()}, ensure_ascii=False)
    if file is not None:
        replace_bytes(file, f"{shown}\n".encode())
    return str(shown)


def media_bytes(value: Any, modality: str) -> Path | bytes | None:
    """Return an image or audio clip, if any, as the path or bytes of a file; DataError if it is of another type."""
    if value is None:
        return None
    if isinstance(value, str | Path):
        return Path(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    try:
        if modality == "image":
            if not isinstance(value, PIL.Image.Image) and np.asarray(value).dtype.kind == "f":
                raise TypeError  # Pillow would read 0 to 1 as black
            is_pillow, buffer = isinstance(value, PIL.Image.Image), io.BytesIO()
            image = upright(value if is_pillow else PIL.Image.fromarray(np.asarray(value)))
            if image.mode not in PNG_MODES:
                image = in_rgb(image) if is_pillow else image.convert("RGB")
            image.save(buffer, "PNG")
            return buffer.getvalue()
        if isinstance(value, Mapping):
            value = Audio(np.asarray(value["array"]), int(value["sampling_rate"]))
        if isinstance(value, Audio):
            return value.to_bytes()
    except (TypeError, ValueError, KeyError, OSError, RuntimeError, struct.error):
        pass
    kinds = "a Pillow image or an array H W 3 of uint8" if modality == "image" else "openm6.Audio(array, sampling_rate)"
    raise DataError(f"{type(value).__name__} is no {modality} that can be read: give a path, bytes of a file, {kinds}")


def number_series(value: Any) -> NumberSeries | None:
    """Return a series from a mapping of its name to its values, if any; DataError if it is something else."""
    if value is None or isinstance(value, NumberSeries):
        return value
    if not isinstance(value, Mapping) or len(value) != 1:
        raise DataError("a series is given as its name and values, such as {'temp_max': [12.8, 10.6, None]}")
    ((name, values),) = value.items()
    try:
        return NumberSeries(str(name), list(values))
    except TypeError:
        raise DataError(f"the series {name!r} holds {type(values).__name__}: give a list of numbers") from None


def parts_of_messages(messages: Sequence[Mapping[str, Any]], loaded: LoadedModel) -> list[Part]:
    """Return the parts of all turns of a chat; DataError names the message or the part that cannot be read."""
    turns = []
    if not isinstance(messages, Iterable):
        raise DataError(f"a chat is a list of messages, not {type(messages).__name__}")
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise DataError(f"{where} needs a role, one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}] if content else []
        if not isinstance(content, Sequence):
            raise DataError(f"the content of {where} must be a text or a list of parts")
        parts = [_content_part(part, loaded, f"part {number} of {where}") for number, part in enumerate(content)]
        turns.append(("system" if message["role"] == "developer" else message["role"], parts))
    parts = chat_prompt(turns, loaded)
    if not parts:
        raise DataError("the chat is empty: add a message with content")
    return parts


def _content_part(part: Any, loaded: LoadedModel, where: str) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Part("text", part["text"])
    if kind == "numbers" and isinstance(part.get("numbers"), Mapping):
        if not all(isinstance(name, str) for name in part["numbers"]):
            raise DataError(f"{where} has columns whose names are no texts: name them as in the training")
        return Part("numbers", dict(part["numbers"]))
    if kind == "numbers" and isinstance(part.get("series"), Mapping):
        return Part("numbers", number_series({part["series"].get("name"): part["series"].get("values", ())}))
    if isinstance(kind, str) and kind in OPENAI:
        inner = part.get(kind)
        kind, key = OPENAI[kind]
        given = inner.get(key) if isinstance(inner, Mapping) else inner
        given = _decoded(given, where) if kind == "audio" else given
    else:
        given = next((part[key] for key in (kind, "path", "url") if key in part), None) if kind in MEDIA else None
    if given is None:
        raise DataError(f"{where} is not understood: its type is text, image, audio, image_url, input_audio or numbers")
    if isinstance(given, str) and given.startswith("data:"):
        given = _decoded(given.partition(",")[2], where)
    elif isinstance(given, str) and given.startswith(("http:", "https:")):
        raise DataError(f"{where} is a URL, and nothing is fetched: load it, and give its path or bytes")
    modality = loaded.image if kind == "image" else loaded.audio
    return Part(modality.name, read_media(modality, media_bytes(given, modality.name) or b""))


def _decoded(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        raise DataError(f"{where} is not valid base64: encode the file's bytes again") from None
