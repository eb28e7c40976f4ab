"""Inputs of requests as parts for the model, and files of answers.

Messages in OpenAI's form become parts of our modalities. Images and audio are strict base64 or data URLs; only their
headers are read here. Routes that name a task put the input into the task's own prompt.

Images may also come from a few hosts that the operator of the server has named: by https, from public addresses, within
limits. A request could otherwise make the server ask machines that only it can reach (server-side request forgery). So
a name is resolved once, every address that it has must be a public one, the connection goes to the address that was
checked, and no redirect is followed. Error messages name no address.
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Annotated, Literal

import httpx
import numpy as np
import soundfile
from PIL import Image as Pillow
from pydantic import BaseModel, Field

from openm6.inference.load import LoadedModel
from openm6.inference.question import chat_prompt
from openm6.modalities.audio import RATE
from openm6.modalities.image import read_image, upright
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries
from openm6.serve.config import Limits
from openm6.serve.errors import BadRequestError, check_limit
from openm6.tasks.chat import join_neighbours
from openm6.tasks.registry import TASKS
from openm6.tasks.task import fill_prompt

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


# Of a column, and a date as text.
ColumnName = Annotated[str, Field(max_length=256)]
Cell = float | Annotated[str, Field(max_length=256)] | None


class Series(BaseModel):
    """A column over time; null where nothing was observed."""

    name: ColumnName
    values: list[float | None] = Field(min_length=1, max_length=4096, fail_fast=True)


class NumbersPart(BaseModel):
    """Values of columns, dates as text (null: missing), or a series."""

    type: Literal["numbers"]
    numbers: dict[ColumnName, Cell] | None = None
    series: Series | None = None


ContentPart = Annotated[TextPart | ImagePart | AudioPart | NumbersPart, Field(discriminator="type")]
Content = str | Annotated[list[ContentPart], Field(fail_fast=True)]  # one error is enough for an answer


class Message(BaseModel):
    """One turn. A model that was not trained on chats reads turns one after the other, a line each, without roles."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None


def parts_of_messages(messages: list[Message], limits: Limits, loaded: LoadedModel) -> tuple[Part, ...]:
    """Return the parts of all turns as the model reads them. Raise as below."""
    turns = [
        (
            "system" if message.role == "developer" else message.role,
            _content_parts(message.content or "", limits, f"messages.{index}.content"),
        )
        for index, message in enumerate(messages)
    ]
    _check_characters((part for _, parts in turns for part in parts), limits, "messages")
    return _within_limits(chat_prompt(turns, loaded), limits, "messages")


def parts_of_content(content: Content, limits: Limits, param: str) -> tuple[Part, ...]:
    """Return the parts of one turn, neighbouring texts joined; raise BadRequestError if one is broken or too much."""
    parts = _content_parts(content, limits, param)
    _check_characters(parts, limits, param)
    return _within_limits(join_neighbours(parts), limits, param)


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
    _check_characters(parts, limits, param)
    return tuple(part for part in parts if part.modality != "text" or part.raw or "role" in part.options)


def _check_characters(parts: Iterable[Part], limits: Limits, param: str) -> None:
    """Call it before texts are joined, which copies them."""
    characters = sum(len(part.raw) for part in parts if part.modality == "text")
    check_limit(param, characters, limits.characters, "characters")


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
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def image_data_url(image: Pillow.Image, form: ImageFormat = "png") -> str:
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
        image = upright(opened)
    return np.asarray(image.convert("RGBA").getchannel("A")) < 255


def language_of(text: str) -> str:
    return "zh" if _CHINESE.search(text) else "en"


def text_prompt(loaded: LoadedModel, task: str, text: str) -> tuple[Part, ...]:
    """Return a text in the first prompt of a task; it stays as it is if it has the form of one, or without training."""
    language = language_of(text)
    prompts = [prompt.partition("{text}") for prompt in TASKS[task].prompts[language]]
    worded = any(before and text.startswith(before) and text.endswith(after) for before, _, after in prompts)
    if worded or task not in {trained_task.task for trained_task in loaded.description.trained_tasks}:
        return (Part("text", text),)
    return part_prompt(task, Part("text", text), language)


def part_prompt(task: str, part: Part, language: str = "en", column: str = "") -> tuple[Part, ...]:
    """Return the input of a task in its first prompt."""
    found, words = TASKS[task], {"column": column.replace("_", " ")}
    return tuple(fill_prompt(found.prompts[language][0], dict.fromkeys(found.inputs, part), words))


PORT = 443
MAX_FETCHES = 4  # at the same time
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that lead to an IPv4 one


def is_public(address: str) -> bool:
    """Whether an address is a public one, also in the forms of IPv6 that stand for IPv4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


class Fetcher:
    """Fetches the images that chats, embeddings and rankings name by `image_url`."""

    def __init__(self, hosts: Iterable[str], max_parts: int, max_bytes: int, seconds: float) -> None:
        """`max_parts` are of a turn; `max_bytes` and `seconds` are for all images of a request together."""
        self.hosts = frozenset(hosts)
        self.max_parts, self.max_bytes, self.seconds = max_parts, max_bytes, seconds
        # Of its own: names that do not resolve in time must not hold the threads in which other requests are read.
        self._resolvers = ThreadPoolExecutor(MAX_FETCHES, "resolve")
        # Not a client of httpx: that would keep cookies and use proxies.
        self.transport: httpx.AsyncBaseTransport = httpx.AsyncHTTPTransport(
            verify=ssl.create_default_context(),
            limits=httpx.Limits(max_connections=MAX_FETCHES, max_keepalive_connections=0),
        )

    async def fetch_all(self, turns: Iterable[tuple[str, Content | None]]) -> None:
        """Replace https URLs of images in turns, which come with their fields, by data URLs; raise BadRequestError."""
        if not self.hosts:
            return  # what is no data URL is refused when it is read
        remote = []
        for turn, content in turns:
            parts = content if isinstance(content, list) else []
            check_limit(turn, len(parts), self.max_parts, "parts")
            for index, part in enumerate(parts):
                if isinstance(part, ImagePart) and not part.image_url.url.startswith("data:"):
                    param = f"{turn}.{index}.image_url.url"
                    remote.append((param, part.image_url, self._checked(part.image_url.url, param)))
        left = self.max_bytes
        try:
            async with asyncio.timeout(self.seconds):
                for param, image, url in remote:
                    data = await self.fetch(url, param, left)
                    left -= len(data)
                    image.url = "data:;base64," + base64.b64encode(data).decode()
        except TimeoutError:
            sentence = f"{param} did not come within {self.seconds:g} s: send the image as a data URL"
            raise BadRequestError(sentence, param) from None

    async def fetch(self, url: httpx.URL, param: str, most: int) -> bytes:
        """Return the bytes at a checked address; raise BadRequestError if they do not come or are over `most`."""
        host = url.raw_host.decode()
        try:
            addresses = await self.resolve(host)
        except OSError:
            addresses = []
        if not addresses or not all(map(is_public, addresses)):
            raise BadRequestError(f"{param} names a host without a public address: use another", param)
        headers = {"Host": host, "User-Agent": "openm6", "Connection": "close"}
        headers |= {"Accept": "image/*", "Accept-Encoding": "identity"}
        # To the address that was checked, whatever the name resolves to now; the certificate must be the host's.
        target, extensions = url.copy_with(host=addresses[0]), {"sni_hostname": host}
        request = httpx.Request("GET", target, headers=headers, extensions=extensions)
        data = bytearray()
        try:
            async with aclosing(await self.transport.handle_async_request(request)) as response:
                if response.status_code != 200:
                    sentence = f"{param} answers with status {response.status_code}, and redirects are not followed"
                    raise BadRequestError(f"{sentence}: give the image's own address", param)
                async for block in response.aiter_raw():
                    data += block
                    if len(data) > most:
                        sentence = f"{param} makes the images over {self.max_bytes:,} bytes together: shrink them"
                        raise BadRequestError(sentence, param)
        except (httpx.TransportError, OSError):  # httpx passes on some errors of TLS as they are
            raise BadRequestError(f"{param} cannot be fetched: send the image as a data URL", param) from None
        return bytes(data)

    def _checked(self, url: str, param: str) -> httpx.URL:
        try:
            parsed = httpx.URL(url if all("!" <= letter <= "~" for letter in url) else "")
        except httpx.InvalidURL:
            parsed = httpx.URL()
        known = parsed.scheme == "https" and parsed.raw_host.decode() in self.hosts and parsed.port in (None, PORT)
        if not known or parsed.userinfo:
            allowed = ", ".join(sorted(self.hosts))
            raise BadRequestError(f"{param} must be a data URL, or https:// and one of {allowed}: change it", param)
        return parsed

    async def resolve(self, host: str) -> list[str]:
        look_up = partial(socket.getaddrinfo, host, PORT, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._resolvers, look_up)
        return [str(address[0]) for *_, address in found]
