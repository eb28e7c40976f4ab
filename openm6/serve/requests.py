"""What the engine is asked and what it answers: plain data, without HTTP."""

# Letters: N places, G codes a place, D width

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.interface import Part


@dataclass(frozen=True, kw_only=True)
class Request:
    """Parts to read, in order. `client` is who is asking, for fairness; `seconds` is how long the answer may take."""

    parts: tuple[Part, ...]
    client: str = ""
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class TextRequest(Request):
    """Wants text; `stop` are strings that end it (and are left out), `top` how many rivals of each token to score."""

    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top: int | None = None


@dataclass(frozen=True, kw_only=True)
class CodesRequest(Request):
    """Wants a picture or a sound. `given` are the bytes of one to be kept but for `hole` (or `gap`).

    `hole` is a box in shares of the side, or a mask (H W bool, true where it is to be filled in).
    """

    want: Literal["image", "sound"]
    sampling: MaskedSampling = field(default_factory=MaskedSampling)
    given: bytes | None = None
    hole: Any = None
    gap: tuple[float, float] | None = None
    duration: float | None = None


@dataclass(frozen=True, kw_only=True)
class NumbersRequest(Request):
    """Wants distributions: of `columns`, or of `ahead` steps of the column `series`."""

    columns: tuple[str, ...] = ()
    series: str | None = None
    ahead: int = 8


@dataclass(frozen=True, kw_only=True)
class RankRequest(Request):
    """Wants the likelihood of each candidate text as the answer to the parts."""

    candidates: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EmbedRequest(Request):
    """Wants one vector of unit length for all parts together."""


@dataclass(frozen=True)
class Usage:
    """Tokens read, by modality, those read before and found again, and those given."""

    read: dict[str, int] = field(default_factory=dict)
    cached: int = 0
    given: int = 0

    @property
    def prompt(self) -> int:
        return sum(self.read.values())


@dataclass(frozen=True)
class Scored:
    """A token of a text as its own text, its log-probability, and those of its likeliest rivals."""

    text: str
    log_probability: float
    rivals: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a request.

    value: a text (str), codes (Tensor N G), distributions (one `Histogram` for each column, in order), nats of each
        candidate with its number of tokens (list of pairs), or a vector (array D), as the request asked
    finish: `stop` where the answer ended by itself, `length` where it was cut
    confidence: geometric mean probability of the tokens of a text, None for anything else
    joules: its share of the energy counted while it was worked on, None where nothing counts; source says by what
    """

    value: Any
    usage: Usage
    finish: Literal["stop", "length"] = "stop"
    scored: tuple[Scored, ...] = ()
    confidence: float | None = None
    joules: float | None = None
    source: str | None = None
    waited: float = 0.0
    first: float = 0.0
    seconds: float = 0.0
