"""Bodies of `/v1/chat/completions`, as the official client sends and reads them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from openm6.serve.content import Message
from openm6.serve.distributions import Distribution
from openm6.serve.media import PictureFormat, SoundFormat
from openm6.serve.schemas import MAX_SEED, Energy, TokenUsage
from openm6.serve.teaching import Teaching

# Fields of OpenAI's that would change the answer: the values that ask for nothing, besides null and what is empty.
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
Wanted = Literal["text", "image", "audio", "numbers"]
Stop = Annotated[str, Field(min_length=1, max_length=64)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class SoundSettings(BaseModel):
    """`voice` is accepted and changes nothing."""

    format: SoundFormat = "wav"
    voice: str | None = None


class NumbersSettings(BaseModel):
    """Which number is wanted: a `column`, or, for a series given, how many steps `ahead`."""

    column: str | None = None
    ahead: int = Field(default=8, ge=1, le=64)
    coverage: float = Field(default=0.8, gt=0, lt=1)


class PictureSettings(BaseModel):
    """How a picture in the answer is drawn, and as what file."""

    format: PictureFormat = "png"


class DrawSettings(BaseModel):
    """Masked-parallel decoding of pictures and sounds in the answer."""

    steps: int = Field(default=8, ge=1, le=64)
    guidance: float = Field(default=2.0, ge=0, le=20)


class ChatBody(BaseModel):
    """OpenAI's fields; `modalities` may also hold `image` and `numbers`; top_k, numbers, image and draw are ours.

    `temperature` is 0 unless given: a small model answers best by its likeliest words.
    Fields of OpenAI's that would change the answer and are not offered are refused, see `refuse_unsupported`.
    """

    model_config = ConfigDict(extra="allow")

    messages: list[Message] = Field(min_length=1, max_length=64)
    model: str
    modalities: list[Wanted] | None = Field(default=None, min_length=1, max_length=4)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=8)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    stop: Stop | list[Stop] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    audio: SoundSettings | None = None
    image: PictureSettings | None = None
    numbers: NumbersSettings | None = None
    draw: DrawSettings | None = None


class AnswerAudio(BaseModel):
    """A sound in the answer, base64."""

    id: str
    data: str
    expires_at: int
    transcript: str = ""


class DataURL(BaseModel):
    url: str


class AnswerImage(BaseModel):
    """A picture in the answer, as a data URL."""

    type: Literal["image_url"] = "image_url"
    image_url: DataURL


class AnswerMessage(BaseModel):
    """What the model gives: text in `content`, the rest in fields of its own."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: str | None = None
    audio: AnswerAudio | None = None
    images: list[AnswerImage] | None = None
    numbers: dict[str, Distribution] | None = None


class Rival(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(Rival):
    top_logprobs: list[Rival] = []


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]


class Completion(Energy, Teaching):
    """One answer for each choice; `seed` repeats it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: TokenUsage
    seed: int


class Delta(BaseModel):
    """What is new in a piece of a streamed answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    audio: AnswerAudio | None = None
    images: list[AnswerImage] | None = None
    numbers: dict[str, Distribution] | None = None


class DeltaChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Chunk(Energy, Teaching):
    """A piece of a streamed answer; the last one with choices carries the joules, and whether it was taught."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: TokenUsage | None = None
    seed: int | None = None
