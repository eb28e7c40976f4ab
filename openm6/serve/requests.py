"""Requests to the engine, its answers and refusals, as plain data without HTTP; tokens of a request, files of answers.

`prepare` runs in threads of its own, before a request is queued: files are decoded and inputs are checked there.
"""

# Shapes: N positions, G codes of a position, D width

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image as Pillow

from openm6.core.errors import DataError, OpenM6Error
from openm6.inference.load import LoadedModel
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.image import box_mask, read_image, to_square
from openm6.modalities.interface import Part, Segment
from openm6.modalities.registry import opened, prompt_segments, split_opening
from openm6.modalities.series import NumberSeries


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
    """Inputs, in order. `client` identifies the sender, for fairness; `seconds` is the time until the deadline."""

    output: ClassVar[str] = "text"  # the modality of the answer
    parts: tuple[Part, ...]
    client: str = ""
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class TextRequest(Request):
    """Text as output. `stop` strings end it and are left out; `top` is how many alternatives of each token to score."""

    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top: int | None = None


@dataclass(frozen=True, kw_only=True)
class CodesRequest(Request):
    """An image or audio as output, decoded in parallel.

    source: bytes of a file of which everything but the mask (or the span) is kept
    mask: a box in fractions of the sides, or an array (H W bool, true where it is generated)
    span: start and end in fractions of the length
    """

    modality: Literal["image", "audio"]
    sampling: MaskedSampling = field(default_factory=MaskedSampling)
    source: bytes | None = None
    mask: Any = None
    span: tuple[float, float] | None = None
    duration: float | None = None

    @property
    def output(self) -> str:  # type: ignore[override]
        return self.modality


@dataclass(frozen=True, kw_only=True)
class NumbersRequest(Request):
    """Distributions as output: of `columns`, or of the `ahead` steps after `series`."""

    output: ClassVar[str] = "numbers"
    columns: tuple[str, ...] = ()
    series: NumberSeries | None = None
    ahead: int = 8

    @property
    def name(self) -> str:
        return self.series.name if self.series else self.columns[0]


@dataclass(frozen=True, kw_only=True)
class RankRequest(Request):
    """The likelihood of each candidate text as output."""

    candidates: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EmbedRequest(Request):
    """One vector of unit length for all parts together as output."""


@dataclass(frozen=True)
class Usage:
    """Prompt tokens by modality, how many of them were in the prefix cache, and generated tokens."""

    by_modality: dict[str, int] = field(default_factory=dict)
    cached: int = 0
    generated: int = 0

    @property
    def prompt(self) -> int:
        return sum(self.by_modality.values())


@dataclass(frozen=True)
class ScoredToken:
    """A token's text and bytes, its log-probability, and the likeliest alternatives, which have none themselves."""

    text: str
    data: bytes
    logprob: float
    alternatives: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of a request.

    value: a text (str), codes (Tensor N G), distributions (one `Histogram` for each column, in order), the negative
        log-likelihood of each candidate with its number of tokens (list of pairs), or a vector (array D)
    finish: `stop` if the answer ended by itself, `length` if it was cut
    confidence: geometric mean probability of the tokens of a text, None for anything else
    joules: its part of the energy that was measured while it was computed, None if nothing measures it
    energy_source: what measured the energy
    """

    value: Any
    usage: Usage
    finish: Literal["stop", "length"] = "stop"
    tokens: tuple[ScoredToken, ...] = ()
    confidence: float | None = None
    joules: float | None = None
    energy_source: str | None = None
    first_token_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class PreparedRequest:
    """A request as tokens: the prompt and the targets (several segments if candidates are ranked, none for text).

    `opening` opens a text instead of the start token, see `split_opening`.
    """

    request: Request
    prompt: list[Segment]
    targets: list[Segment]
    opening: int | None = None

    @cached_property
    def by_modality(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for segment in self.prompt:
            kind = segment.kind.removesuffix("_in")
            found["numbers" if kind == "series" else kind] += len(segment)
        if self.opening is not None:
            found["text"] += 1
        return dict(found)

    @cached_property
    def prompt_length(self) -> int:
        return sum(map(len, self.prompt))

    @cached_property
    def work(self) -> int:
        """Tokens that the answer will run through the model, at most: the unit of the queue and of fairness."""
        generated = sum(map(len, self.targets))
        if isinstance(self.request, TextRequest):
            generated = self.request.sampling.max_tokens
        if isinstance(self.request, CodesRequest):
            generated *= self.request.sampling.passes
        return self.prompt_length + generated


def prepare(request: Request, loaded: LoadedModel, max_length: int) -> PreparedRequest:
    """Return the tokens of a request; raise DataError if a part is broken, or `max_length` tokens are exceeded."""
    if isinstance(request, CodesRequest):
        request = replace(request, sampling=loaded.masked_sampling(request.sampling))
    prompt = [segment for segment in prompt_segments(request.parts, loaded.modalities) if len(segment)]
    is_empty, opening = not prompt, None
    if isinstance(request, TextRequest | RankRequest):
        prompt, opening = split_opening(prompt)
    targets = [opened(target, opening) for target in _targets(request, loaded)]
    prepared = PreparedRequest(request, prompt, targets, opening)
    longest = max((len(segment) for segment in prepared.targets), default=0)
    if isinstance(request, TextRequest):
        longest = request.sampling.max_tokens
    if is_empty and not isinstance(request, CodesRequest):
        raise DataError("the input is empty: add a text, an image, audio or numbers")
    if prepared.prompt_length + longest + 1 > max_length:
        raise DataError(
            f"{prepared.prompt_length} prompt tokens and {longest} of the answer exceed the {max_length} of a "
            f"request: shorten it"
        )
    return prepared


def _targets(request: Request, loaded: LoadedModel) -> list[Segment]:
    """What is to be decoded: all codes or those of the masked region, numbers, or each candidate."""
    match request:
        case CodesRequest(modality="image", source=None):
            return [loaded.image.blank()]
        case CodesRequest(modality="image"):
            return [loaded.image.target(request.source, options={"mask_box": request.mask})]
        case CodesRequest(source=None):
            return [loaded.audio.blank(request.duration)]
        case CodesRequest():
            options = {"mask_span": request.span, "seconds": request.duration}
            return [loaded.audio.target(request.source, options=options)]
        # Steps and columns to predict are marked by any value that is not missing.
        case NumbersRequest(series=NumberSeries() as past):
            return [loaded.numbers.target(past.to_forecast(request.ahead))]
        case NumbersRequest():
            asked = {name: loaded.numbers.scale(name)[0] for name in request.columns}
            return [loaded.numbers.target(asked, options={"given": loaded.numbers.given(request.parts)})]
        case RankRequest():
            return [loaded.text.candidate(candidate) for candidate in request.candidates]
    return []


def decode_codes(request: CodesRequest, codes: Any, loaded: LoadedModel) -> Pillow.Image | np.ndarray:
    """Return the image, or the samples of the audio, that answer a request; outside a mask the source is kept."""
    if request.modality == "audio":
        return loaded.audio.decode(codes)
    image, mask = loaded.image, request.mask
    drawn = image.decode(codes)
    if request.source is None or mask is None:
        return drawn
    source = read_image(request.source, image.max_pixels)
    if not isinstance(mask, np.ndarray):
        mask = box_mask(mask, source.height, source.width).reshape(source.height, source.width)
    # All is made square, as the model reads the source.
    outside = to_square(Pillow.fromarray(np.where(mask, 0, 255).astype(np.uint8)).convert("RGB"), image.side)
    kept = outside.convert("L").point(lambda value: 255 if value == 255 else 0)
    return Pillow.composite(to_square(source, image.side), drawn, kept)
