"""One layer: attention and a feed-forward part, each behind a norm and added to the stream."""

# Letters: B rows, S tokens, D width

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from openm6.nn.attention import Attention, HeadNorms, Mask
from openm6.nn.cache import TokenCache
from openm6.nn.config import AttentionConfig, DenseConfig, ExpertsConfig
from openm6.nn.exchange import ExpertExchange
from openm6.nn.experts import Experts, Router, RouterLoad
from openm6.nn.feedforward import FeedForward
from openm6.nn.norm import RMSNorm


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass have in common.

    rotary: cosines and sines of the new tokens; mask: who sees whom; valid: B S bool, tokens that are not padding
    """

    rotary: tuple[Tensor, Tensor]
    mask: Mask
    valid: Tensor
    cache: TokenCache | None
    exchange: ExpertExchange


class LayerParts(nn.Module):
    """What a layer keeps to itself even where it shares its weight set: the norms, and its router if unshared."""

    def __init__(self, attention: AttentionConfig, router: Router | None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(attention.width, attention.norm_eps)
        self.head_norms = HeadNorms(attention.head_dim) if attention.qk_norm else None
        self.feed_forward_norm = RMSNorm(attention.width, attention.norm_eps)
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
            self.feed_forward = Experts(attention.width, feed_forward)
        else:
            self.feed_forward = FeedForward(attention.width, feed_forward)
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
    ) -> tuple[Tensor, RouterLoad | None]:
        """B S D -> B S D, and the router's report where the layer has experts."""
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
