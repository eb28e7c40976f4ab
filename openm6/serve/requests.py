"""Requests to the engine, its answers and refusals, as plain data without HTTP, and the tokens of a request.

`prepare` runs in threads of its own, before a request is queued: files are decoded and inputs are checked there.
"""

# Shapes: N positions, G codes of a position, D width

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from openm6.core.errors import DataError, OpenM6Error
from openm6.inference.load import LoadedModel
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.interface import Part, Segment
from openm6.modalities.numbers import NumberSeries
from openm6.modalities.registry import source_segments

MODALITY_OF = {"text": "text", "image_in": "image", "audio_in": "audio", "numbers_in": "numbers"}


class QueueFullError(OpenM6Error):
    """Too much is waiting; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceededError(OpenM6Error):
    """The deadline passed before the answer was there, or the request was cancelled."""


class EngineUnavailableError(OpenM6Error):
    """The server is shutting down, or its engine failed."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Inputs, in order. `client` is who asks, for fairness; `seconds` is how long the answer may take."""

    parts: tuple[Part, ...]
    client: str = ""
    seconds: float | None = None

    @property
    def output(self) -> str:
        """The modality of the answer."""
        return "text"


@dataclass(frozen=True, kw_only=True)
class TextRequest(Request):
    """Asks for text. `stop` strings end it and are left out; `top` is how many alternatives of each token to score."""

    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top: int | None = None


@dataclass(frozen=True, kw_only=True)
class CodesRequest(Request):
    """Asks for an image or audio, decoded in parallel.

    source: bytes of a file of which everything but the mask (or the span) is kept
    mask: a box in fractions of the sides, or an array (H W bool, true where it is to be filled in)
    span: start and end in fractions of the length
    """

    modality: Literal["image", "audio"]
    sampling: MaskedSampling = field(default_factory=MaskedSampling)
    source: bytes | None = None
    mask: Any = None
    span: tuple[float, float] | None = None
    duration: float | None = None

    @property
    def output(self) -> str:
        return self.modality


@dataclass(frozen=True, kw_only=True)
class NumbersRequest(Request):
    """Asks for distributions: of `columns`, or of `ahead` steps of the column `series`."""

    columns: tuple[str, ...] = ()
    series: str | None = None
    ahead: int = 8

    @property
    def output(self) -> str:
        return "numbers"

    @property
    def name(self) -> str:
        """The first column that is predicted."""
        return self.series or self.columns[0]


@dataclass(frozen=True, kw_only=True)
class RankRequest(Request):
    """Asks for the likelihood of each candidate text as the answer."""

    candidates: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EmbedRequest(Request):
    """Asks for one vector of unit length for all parts together."""


@dataclass(frozen=True)
class Usage:
    """Prompt tokens by modality, how many of them were in the prefix cache, and generated tokens."""

    by_modality: dict[str, int] = field(default_factory=dict)
    cached: int = 0
    generated: int = 0

    @property
    def prompt(self) -> int:
        """Prompt tokens of all modalities."""
        return sum(self.by_modality.values())


@dataclass(frozen=True)
class ScoredToken:
    """A token's text, its log-probability, and those of its likeliest alternatives."""

    text: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of a request.

    value: a text (str), codes (Tensor N G), distributions (one `Histogram` for each column, in order), nats of each
        candidate with its number of tokens (list of pairs), or a vector (array D), as the request asked
    finish: `stop` if the answer ended by itself, `length` if it was cut
    confidence: geometric mean probability of the tokens of a text, None for anything else
    joules: its share of the energy that was measured while it was computed, None if nothing measures it
    energy_source: what measured the energy
    """

    value: Any
    usage: Usage
    finish: Literal["stop", "length"] = "stop"
    tokens: tuple[ScoredToken, ...] = ()
    confidence: float | None = None
    joules: float | None = None
    energy_source: str | None = None
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class PreparedRequest:
    """A request as tokens: the prompt and the targets (several segments if candidates are ranked, none for text)."""

    request: Request
    prompt: list[Segment]
    targets: list[Segment]

    @property
    def by_modality(self) -> dict[str, int]:
        """Tokens of the prompt by modality."""
        found: Counter[str] = Counter()
        for segment in self.prompt:
            found[MODALITY_OF[segment.kind]] += len(segment)
        return dict(found)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return sum(map(len, self.prompt))

    @property
    def target_length(self) -> int:
        """Tokens of all targets."""
        return sum(map(len, self.targets))

    @property
    def work(self) -> int:
        """Tokens that the answer will run through the model, at most: the unit of the queue and of fairness."""
        generated = self.target_length
        if isinstance(self.request, TextRequest):
            generated = self.request.sampling.max_tokens
        if isinstance(self.request, CodesRequest):
            sampling = self.request.sampling
            generated *= sampling.steps * (2 if sampling.guidance > 0 else 1)
        return self.prompt_length + generated


def prepare(request: Request, loaded: LoadedModel, max_length: int) -> PreparedRequest:
    """Return the tokens of a request.

    Raises:
        DataError: a part is broken or out of bounds, or prompt and answer need more than `max_length` tokens.
    """
    prompt = [segment for segment in source_segments(request.parts, loaded.modalities) if len(segment)]
    prepared = PreparedRequest(request, prompt, _targets(request, loaded))
    longest = max((len(segment) for segment in prepared.targets), default=0)
    if isinstance(request, TextRequest):
        longest = request.sampling.max_tokens
    if not prompt and not isinstance(request, CodesRequest):
        raise DataError("the input is empty: add a text, an image, audio or numbers")
    if prepared.prompt_length + longest + 1 > max_length:
        raise DataError(
            f"{prepared.prompt_length} prompt tokens and {longest} of the answer exceed the {max_length} of a "
            f"request: shorten it"
        )
    return prepared


def _targets(request: Request, loaded: LoadedModel) -> list[Segment]:
    if isinstance(request, CodesRequest):
        return [_masked_target(request, loaded)]
    if isinstance(request, NumbersRequest):
        return [loaded.numbers.target(_queries(request, loaded))]
    if isinstance(request, RankRequest):
        return [loaded.text.target(candidate) for candidate in request.candidates]
    return []


def _masked_target(request: CodesRequest, loaded: LoadedModel) -> Segment:
    """Codes to decode: all, or those of the masked region of the source."""
    if request.modality == "image":
        if request.source is None:
            return loaded.image.blank()
        return loaded.image.target(request.source, options={"mask_box": request.mask})
    if request.source is None:
        return loaded.audio.blank(request.duration)
    return loaded.audio.target(
        request.source, options={"mask_span": request.span, "seconds": request.duration}
    )


def _queries(request: NumbersRequest, loaded: LoadedModel) -> NumberSeries | dict[str, float]:
    """What is asked for, marked by any value that is not missing."""
    if request.series is not None:
        return NumberSeries(request.series, [loaded.numbers.scale(request.series)[0]] * request.ahead)
    return {name: loaded.numbers.scale(name)[0] for name in request.columns}
