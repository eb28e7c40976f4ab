"""Bodies of `/v1/chat/completions`, as the official client sends and reads them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from openm6.serve.content import AudioFormat, ImageFormat, Message
from openm6.serve.schemas import Distribution, Energy, Guidance, Seed, Steps, Teaching, TokenUsage

# Fields of OpenAI's that would change the answer: the values that ask for nothing, besides null and empty ones.
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
Output = Literal["text", "image", "audio", "numbers"]
Stop = Annotated[str, Field(min_length=1, max_length=64)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class AudioSettings(BaseModel):
    """`voice` is accepted and changes nothing."""

    format: AudioFormat = "wav"
    voice: str | None = None


class NumbersSettings(BaseModel):
    """What to predict: a `column`, or, if a series is given, how many steps `ahead`."""

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

    `temperature` is 0 unless given: a small model answers best by its likeliest words.
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


class AnswerAudio(BaseModel):
    """Audio in the answer, base64."""

    id: str
    data: str
    expires_at: int
    transcript: str = ""


class DataURL(BaseModel):
    url: str


class AnswerImage(BaseModel):
    """An image in the answer, as a data URL."""

    type: Literal["image_url"] = "image_url"
    image_url: DataURL


class AnswerMessage(BaseModel):
    """The answer: text in `content`, the rest in fields of its own."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: str | None = None
    audio: AnswerAudio | None = None
    images: list[AnswerImage] | None = None
    numbers: dict[str, Distribution] | None = None


class TokenAlternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TokenAlternative):
    top_logprobs: list[TokenAlternative] = []


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
    """What is new in a chunk of a streamed answer."""

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
    """A chunk of a streamed answer; the last one with choices holds the joules, and whether it was trained for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: TokenUsage | None = None
    seed: int | None = None
