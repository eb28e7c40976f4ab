"""Messages of a chat as parts to read: the words of the API in, raw parts of our modalities out."""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from openm6.modalities.interface import Part
from openm6.modalities.numbers import NumberSeries
from openm6.serve.config import Limits
from openm6.serve.errors import BadRequestError
from openm6.serve.media import check_picture, check_sound, from_base64, from_data_url


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
    """`data` is base64 of a file; its own header says what it is."""

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
    """Values of columns (null: missing), or a series."""

    type: Literal["numbers"]
    numbers: dict[str, float | None] | None = None
    series: Series | None = None


ContentPart = Annotated[TextPart | ImagePart | AudioPart | NumbersPart, Field(discriminator="type")]
Content = str | list[ContentPart]


class Message(BaseModel):
    """One turn. The model was taught no roles: turns are read one after the other, a line each."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None


def parts_of_messages(messages: list[Message], limits: Limits, apart: bool = False) -> tuple[Part, ...]:
    """All turns as parts, in order; neighbouring texts become one, those of two turns unless they stay `apart`.

    Raises:
        BadRequestError: there are too many parts or characters, or one of them is broken.
    """
    turns: list[list[Part]] = []
    for number, message in enumerate(messages):
        where = f"messages.{number}.content"
        found = parts_of_content(message.content or "", limits, where)
        if found:
            turns.append([Part("text", "\n"), *found] if turns else found)
    groups = turns if apart else [list(chain.from_iterable(turns))]
    return _bounded([part for group in groups for part in _merged(group)], limits, "messages")


def pictures_in(content: Content | None, where: str) -> list[tuple[str, ImageURL]]:
    """The pictures of a turn, each with the name of its field."""
    pieces = content if isinstance(content, list) else []
    return [
        (f"{where}.{number}.image_url.url", piece.image_url)
        for number, piece in enumerate(pieces)
        if isinstance(piece, ImagePart)
    ]


def parts_of_content(content: Content, limits: Limits, where: str) -> list[Part]:
    """The parts of one turn. A text after something else begins with a blank, as the model was taught."""
    if isinstance(content, str):
        return [Part("text", content)] if content else []
    parts: list[Part] = []
    for number, piece in enumerate(content):
        part = _part(piece, limits, f"{where}.{number}")
        if part.modality == "text" and parts and parts[-1].modality != "text":
            part = Part("text", part.raw if part.raw[:1].isspace() else " " + part.raw)
        parts.append(part)
    return parts


def _part(piece: Any, limits: Limits, where: str) -> Part:
    if isinstance(piece, TextPart):
        return Part("text", piece.text)
    if isinstance(piece, ImagePart):
        param = f"{where}.image_url.url"
        return Part("image", check_picture(from_data_url(piece.image_url.url, param), limits.pixels, param))
    if isinstance(piece, AudioPart):
        param = f"{where}.input_audio.data"
        return Part(
            "sound", check_sound(from_base64(piece.input_audio.data, param), limits.sound_seconds, param)
        )
    assert isinstance(piece, NumbersPart)
    return numbers_part(piece, limits, where)


def numbers_part(piece: NumbersPart, limits: Limits, where: str) -> Part:
    """Columns or a series as a part.

    Raises:
        BadRequestError: both, neither, or too many columns.
    """
    if (piece.numbers is None) == (piece.series is None):
        raise BadRequestError(f"{where} needs either numbers or series", where)
    if piece.series is not None:
        return Part("numbers", NumberSeries(piece.series.name, piece.series.values))
    if not piece.numbers or len(piece.numbers) > limits.columns:
        raise BadRequestError(f"{where}.numbers must hold 1 to {limits.columns} columns", f"{where}.numbers")
    return Part("numbers", piece.numbers)


def joined(parts: list[Part], limits: Limits, where: str) -> tuple[Part, ...]:
    """Neighbouring texts as one, and all within the limits."""
    return _bounded(_merged(parts), limits, where)


def _merged(parts: list[Part]) -> list[Part]:
    found: list[Part] = []
    for part in parts:
        if part.modality == "text" and found and found[-1].modality == "text":
            found[-1] = Part("text", found[-1].raw + part.raw)
        else:
            found.append(part)
    return found


def _bounded(found: list[Part], limits: Limits, where: str) -> tuple[Part, ...]:
    if len(found) > limits.parts:
        raise BadRequestError(f"{where} hold {len(found)} parts, over {limits.parts}: send fewer", where)
    characters = sum(len(part.raw) for part in found if part.modality == "text")
    if characters > limits.characters:
        raise BadRequestError(
            f"{where} hold {characters} characters, over {limits.characters}: shorten them", where
        )
    return tuple(part for part in found if part.modality != "text" or part.raw)
