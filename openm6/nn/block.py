"""One layer: attention and a feed-forward part, each behind a norm and added to the stream."""

# Letters: B rows, S tokens, D width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from openm6.nn.attention import Attention, HeadNorms, Mask
from openm6.nn.cache import TokenCache
from openm6.nn.config import AttentionConfig, DenseConfig, ExpertsConfig
from openm6.nn.layers import FeedForward, RMSNorm
from openm6.nn.moe import Experts, Router, RouterStats, TokenDispatcher
from openm6.ops.sequence import SequenceMeta


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass have in common.

    rotary: cosines and sines of the new tokens; mask: who sees whom; valid: B S bool, tokens that are not padding
    """

    rotary: tuple[Tensor, Tensor]
    mask: Mask
    valid: Tensor
    cache: TokenCache | None
    exchange: TokenDispatcher


class LayerParts(nn.Module):
    """What a layer keeps to itself even if it shares its weight set: the norms, and its router if unshared."""

    def __init__(self, attention: AttentionConfig, router: Router | None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(attention.hidden_size, attention.norm_eps)
        self.head_norms = HeadNorms(attention.head_dim) if attention.qk_norm else None
        self.feed_forward_norm = RMSNorm(attention.hidden_size, attention.norm_eps)
        self.router = router

    def reset_parameters(self, deviation: float) -> None:
        self.attention_norm.reset_parameters()
        self.feed_forward_norm.reset_parameters()
        if self.head_norms is not None:
            self.head_norms.reset_parameters()
        if self.router is not None:
            self.router.reset_parameters(deviation)


class Block(nn.Module):
    """A weight set: the matrices of one layer, or of several that share them."""

    def __init__(
        self, attention: AttentionConfig, feed_forward: DenseConfig | ExpertsConfig, router: Router | None
    ) -> None:
        super().__init__()
        self.attention = Attention(attention)
        self.feed_forward: FeedForward | Experts
        if isinstance(feed_forward, ExpertsConfig):
            self.feed_forward = Experts(attention.hidden_size, feed_forward)
        else:
            self.feed_forward = FeedForward(attention.hidden_size, feed_forward)
        self.router = router

    def reset_parameters(self, deviation: float, output_deviation: float) -> None:
        self.attention.reset_parameters(deviation, output_deviation)
        self.feed_forward.reset_parameters(deviation, output_deviation)
        if self.router is not None:
            self.router.reset_parameters(deviation)

    @property
    def sparse(self) -> bool:
        """Whether its feed-forward part has experts."""
        return isinstance(self.feed_forward, Experts)

    def forward(
        self, x: Tensor, parts: LayerParts, context: Context, layer: int
    ) -> tuple[Tensor, RouterStats | None]:
        """B S D -> B S D, and the router's report if the layer has experts."""
        attended = self.attention(
            parts.attention_norm(x), parts.head_norms, context.rotary, context.mask, context.cache, layer
        )
        x = x + attended
        normal = parts.feed_forward_norm(x)
        if isinstance(self.feed_forward, FeedForward):
            return x + self.feed_forward(normal), None
        router = parts.router if parts.router is not None else self.router
        y, load = self.feed_forward(normal, router, context.valid, context.exchange, layer)
        return x + y, load


MakeContext = Callable[[Tensor, SequenceMeta], Context]


class BlockSource(Protocol):
    """Return the block of each layer if not all of them are on the device at once."""

    def block(self, layer: int) -> Block:
        """The block, ready on the device until that of another layer is asked for."""
        ...


class BlockRunner(Protocol):
    """Runs all layers on embedded tokens, in as many parts of the batch as it sees fit."""

    def run(
        self, x: Tensor, meta: SequenceMeta, layers: Sequence[LayerParts], make_context: MakeContext
    ) -> tuple[Tensor, list[RouterStats]]:
        """B S D -> B S D before the final norm, and a report for each sparse layer.

        `make_context` returns the context of some of the rows.
        """
        ...
