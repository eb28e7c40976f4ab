"""What every modality offers: raw input to tokens on the way in, hidden states to a loss and raw output out."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from torch import Tensor, nn

Placement = Literal["source", "part", "causal", "block", "aside"]
Arrays = dict[str, np.ndarray]
Options = Mapping[str, Any]
NO_OPTIONS: Options = MappingProxyType({})
Rng = np.random.Generator | None
Moves = tuple[int, int, int]
ALONG: Moves = (1, 1, 1)
# The last two of an image or a recording count from its own origin, in units that its patches and its codes share. So a
# target at a position has the rotary position of the source patch there, whatever the length of the text between.
OWN_ORIGIN: Moves = (1, 0, 0)


def modality_of(kind: str) -> str:
    """The modality of a kind of token: its name begins with that, but for series, which are numbers."""
    return kind.partition("_")[0].replace("series", "numbers")


class Cuttable(NamedTuple):
    """A span of a text, in characters or tokens, that may lose its end (with `keep_end`: its start)."""

    start: int
    stop: int
    keep_end: bool = False


@dataclass(frozen=True)
class Segment:
    """One segment of raw input as N tokens: the input of the sequence rule and of an adapter.

    `kind` names the adapter that embeds them. `arrays` holds one array per feature, each with leading length N.
    `grid` (N 3, int) is each token's offset in time, height and width; `moves` states for each axis whether it counts
    from the start of the segment (1) or from its own origin (0); `span` is the number of positions to the next
    segment. `learn` (N, bool) marks the tokens that carry a loss. `placement` is `source` (of the order of what
    precedes it, at first 0), `part` (a source of the next order, which attends to itself and to what precedes it),
    `causal` (one order after the other), `block` (one order for all, private) or `aside` (causal and private).
    `truncated`: the raw input was longer than what became tokens; `cuttable`: the spans of them that may still be
    shortened. `opening`: if this ends the prompt of a chat, the tokens before an answer in text.
    """

    kind: str
    arrays: Arrays
    grid: np.ndarray
    span: int
    learn: np.ndarray
    placement: Placement = "source"
    moves: Moves = ALONG
    truncated: bool = False
    cuttable: tuple[Cuttable, ...] = ()
    opening: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.grid)


@dataclass(frozen=True)
class Part:
    """Raw input of one modality on its way into a sequence, with the options its modality understands."""

    modality: str
    raw: Any
    options: dict[str, Any] = field(default_factory=dict)


@functools.lru_cache(256)
def line(length: int) -> np.ndarray:
    """The grid of a run of tokens in time: one offset on all three axes, as for text.  # N 3"""
    return np.repeat(np.arange(length, dtype=np.int32)[:, None], 3, axis=1)


class Adapter(nn.Module, ABC):
    """Embeds one kind of token in the backbone's hidden size and, if it can be a target, computes its loss."""

    @abstractmethod
    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        """Features of N tokens to vectors.  # N … -> N D"""

    def nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Negative log-likelihood in nats of the target of each of N tokens.  # N D -> N"""
        raise NotImplementedError(f"{type(self).__name__} is an input only, never a target")

    def training_loss(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """What training minimizes: the likelihood itself unless a smoothed form generalizes better.  # N D -> N"""
        return self.nll(hidden, arrays)

    def weighted_loss(self, hidden: Tensor, arrays: dict[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """Σ weight · loss, with a gradient, and the loss of each token, without.  # N D, N -> (), N"""
        nll = self.training_loss(hidden, arrays).float()
        return (nll * weight).sum(), nll.detach()


class Modality(ABC):
    """Turns raw input into source or target tokens (in data workers, checking bounds) and makes its adapters."""

    name: ClassVar[str]

    @abstractmethod
    def source(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """Input tokens, augmented by a generator if there is one; DataError: broken, empty or out of bounds."""

    @abstractmethod
    def target(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """Target tokens. A generator draws the training mask; None masks everything that can be masked."""

    @abstractmethod
    def adapters(self, hidden_size: int) -> dict[str, Adapter]:
        """The adapters of this modality's kinds of token, by kind, for a backbone of this hidden size."""
