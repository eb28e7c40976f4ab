"""One vector for a text, an image or an audio clip: a token that attends to the others, and its contrastive loss."""

# Letters: n pool tokens, P = n/2 pairs, M pairs of all ranks, D hidden size, E size of an embedding

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from openm6.core.config import Config
from openm6.core.seeds import text_hash
from openm6.modalities.interface import Adapter, Segment, line
from openm6.ops.losses import info_nce

# N … of this rank -> M … of all ranks, and where its rows begin; differentiable; all call it equally often.
Gather = Callable[[Tensor], tuple[Tensor, int]]

POOL = "pool"  # the kind of token
FIRST_SCALE, MAX_SCALE = 1 / 0.07, 100.0  # arXiv 2103.00020, section 2.5


class PoolConfig(Config):
    """`size` numbers make an embedding.

    `hidden_size`: a layer of so many units before the embedding (arXiv 2002.05709, section 4.2). A frozen backbone,
    whose hidden states are not trained for it, needs one.
    """

    size: int = Field(default=128, ge=2, le=8192)
    hidden_size: int | None = Field(default=None, ge=2, le=65536)


def pooled(segments: list[Segment], key: str = "", space: str = "", learn: bool = False) -> list[Segment]:
    """Source segments and the token that pools them. Pairs compete within a `space`, those of equal keys never."""
    # 63 bits that stand for a word.
    arrays = {name: np.asarray([text_hash(word) >> 1]) for name, word in (("key", key), ("space", space))}
    placement = segments[-1].placement if segments else "source"
    return [*segments, Segment(POOL, arrays, line(1), 1, np.asarray([learn]), placement)]


class PoolAdapter(Adapter):
    """Embeds the pool token, turns its hidden state into a unit vector, and computes symmetric InfoNCE over pairs.

    Pool tokens come in pairs: rows 2i and 2i + 1 of a batch are the two sides of pair i. `gather` is set by whoever
    trains on several ranks; each rank then compares its own pairs with those of all ranks.
    """

    def __init__(self, hidden_size: int, config: PoolConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(hidden_size).normal_(std=0.02))
        self.size, width = config.size, config.hidden_size
        self.hidden = None if width is None else nn.Linear(hidden_size, width)
        self.project = nn.Linear(width or hidden_size, config.size, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        self.gather: Gather | None = None

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        return self.query.expand(len(arrays["key"]), -1)  # n -> n D

    def vectors(self, hidden: Tensor) -> Tensor:
        """Embeddings of length 1.  # n D -> n E"""
        if self.hidden is not None:
            hidden = F.gelu(self.hidden(hidden))
        return F.normalize(self.project(hidden).float(), dim=-1)

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied with; learned, and bounded."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """NLL of each side's partner among all partners of the batch.  # n D -> n"""
        sides = self.vectors(hidden).unflatten(0, (-1, 2))  # n E -> P 2 E
        all_sides, start = self._all_rows(sides)  # M 2 E
        words = torch.stack([arrays["key"][::2], arrays["space"][::2]], dim=1)  # P 2
        key, space = self._all_rows(words)[0].unbind(1)  # M, M
        same = (words[:, :1] == key) | (words[:, 1:] != space)  # P M
        partner = torch.arange(start, start + len(sides), device=hidden.device)
        nll = [info_nce(sides[:, side], all_sides[:, 1 - side], same, partner, self.scale) for side in (0, 1)]
        return torch.stack(nll, dim=1).flatten()  # P 2 -> n

    def _all_rows(self, x: Tensor) -> tuple[Tensor, int]:
        return (x, 0) if self.gather is None else self.gather(x)

    def none(self) -> Tensor:
        """The loss of no pairs, 0: a rank without pairs must take part in gathering, too."""
        hidden = self.query.new_zeros(0, len(self.query))
        empty = torch.zeros(0, dtype=torch.int64, device=hidden.device)
        return self.nll(hidden, {"key": empty, "space": empty}).sum()
