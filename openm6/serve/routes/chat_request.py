"""Bodies of `/v1/chat/completions`, as the official client sends them, and the requests that they become."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries
from openm6.serve.content import AudioFormat, ImageFormat, Message, parts_of_messages
from openm6.serve.errors import BadRequestError, check_limit
from openm6.serve.requests import CodesRequest, NumbersRequest, Request, TextRequest
from openm6.serve.schemas import Guidance, Seed, Steps, seed_of
from openm6.serve.server import Server

# Fields of OpenAI's that would change the answer: the values that change nothing, besides null and empty ones.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": (),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
DEFAULT_TOKENS = 64
Output = Literal["text", "image", "audio", "numbers"]
Stop = Annotated[str, Field(min_length=1, max_length=64)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class AudioSettings(BaseModel):
    """`voice` is accepted and changes nothing."""

    format: AudioFormat = "wav"
    voice: str | None = None


class NumbersSettings(BaseModel):
    """What to predict: a `column`, or, if the messages hold a series, how many steps `ahead`."""

    column: str | None = None
    ahead: int = Field(default=8, ge=1, le=64)
    coverage: float = Field(default=0.8, gt=0, lt=1)


class ImageSettings(BaseModel):
    """The file format of an image in the answer."""

    format: ImageFormat = "png"


class DrawSettings(BaseModel):
    """Masked-parallel decoding of images and audio in the answer."""

    steps: Steps = 8
    guidance: Guidance = 2.0


class ChatBody(BaseModel):
    """OpenAI's fields; `modalities` may also hold `image` and `numbers`; top_k, numbers, image and draw are ours.

    `temperature` is 0 by default: a small model answers best by its likeliest words.
    Fields of OpenAI's that would change the answer and are not offered are refused, see `refuse_unsupported`.
    """

    model_config = ConfigDict(extra="allow")

    messages: list[Message] = Field(min_length=1, max_length=64)
    model: str
    modalities: list[Output] | None = Field(default=None, min_length=1, max_length=4)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=8)
    seed: Seed = None
    stop: Stop | list[Stop] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    audio: AudioSettings | None = None
    image: ImageSettings | None = None
    numbers: NumbersSettings | None = None
    draw: DrawSettings | None = None

    @property
    def outputs(self) -> list[Output]:
        """Each output modality once, in the order of the body; text by default."""
        return list(dict.fromkeys(self.modalities or ["text"]))


def refuse_unsupported(body: ChatBody) -> None:
    """Raise BadRequestError if a field needs something that is known and not supported."""
    for name, value in (body.model_extra or {}).items():
        neutral = UNSUPPORTED.get(name)
        if neutral is None or value is None or value in ([], {}, *neutral):
            continue
        instead = " 'text' alone is offered" if name == "response_format" else " leave it out"
        raise BadRequestError(f"{name} is not supported:{instead}", name)


def chat_requests(body: ChatBody, server: Server, seed: int) -> list[Request]:
    """For each choice, one request for each output modality; raise BadRequestError if fields do not fit."""
    limits = server.limits
    check_limit("messages", len(body.messages), limits.messages, "messages")
    check_limit("n", body.n or 1, limits.answers)
    parts = parts_of_messages(body.messages, limits, server.loaded)
    if not parts:
        raise BadRequestError("the messages are empty: add a text", "messages")
    draw, found = body.draw or DrawSettings(), list[Request]()
    for index, output in product(range(body.n or 1), body.outputs):
        one = seed_of(seed, index)
        if output == "text":
            found.append(_text_request(body, parts, one, limits.tokens))
        elif output == "numbers":
            found.append(_numbers_request(body.numbers or NumbersSettings(), parts))
        else:
            sampling = MaskedSampling(seed=one, steps=draw.steps, guidance=draw.guidance)
            found.append(CodesRequest(parts=parts, modality=output, sampling=sampling))
    return found


def _text_request(body: ChatBody, parts: tuple[Part, ...], seed: int, max_tokens: int) -> TextRequest:
    tokens = body.max_completion_tokens or body.max_tokens or min(DEFAULT_TOKENS, max_tokens)
    check_limit("max_completion_tokens" if body.max_completion_tokens else "max_tokens", tokens, max_tokens)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    check_limit("stop", len(stop), 4, "strings")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequestError("top_logprobs needs logprobs: set it to true", "top_logprobs")
    sampling = Sampling(
        temperature=body.temperature or 0.0, top_k=body.top_k, top_p=body.top_p, max_tokens=tokens, seed=seed
    )
    top = (body.top_logprobs or 0) if body.logprobs else None
    return TextRequest(parts=parts, sampling=sampling, stop=tuple(stop), top=top)


def _numbers_request(settings: NumbersSettings, parts: tuple[Part, ...]) -> NumbersRequest:
    """The predicted column is removed from the inputs."""
    series = [part.raw for part in parts if isinstance(part.raw, NumberSeries)]
    if settings.column is None and series:
        return NumbersRequest(parts=parts, series=series[-1], ahead=settings.ahead)
    rows = [part.raw for part in parts if isinstance(part.raw, dict)]
    missing = [name for row in rows for name, value in row.items() if value is None]
    if settings.column is None and len(missing) != 1:
        raise BadRequestError(
            "the number to predict is not named: send numbers={'column': …}, or one value of null", "numbers"
        )
    column = settings.column or missing[0]
    inputs = []
    for part in parts:
        if isinstance(part.raw, dict):
            part = replace(part, raw={name: value for name, value in part.raw.items() if name != column})
        if part.raw != {}:
            inputs.append(part)
    if not inputs:
        raise BadRequestError(
            "nothing is left to predict from: add inputs besides the column that is asked for", "messages"
        )
    return NumbersRequest(parts=tuple(inputs), columns=(column,))
