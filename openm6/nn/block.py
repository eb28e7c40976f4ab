"""One layer of the transformer: attention and an MLP, each behind a norm and added to the residual stream."""

# Dimensions: B rows, S tokens, D width

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openm6.nn.attention import Attention, Mask, QKNorm
from openm6.nn.cache import TokenCache
from openm6.nn.config import AttentionConfig, DenseConfig, ExpertsConfig
from openm6.nn.layers import MLP, RMSNorm
from openm6.nn.moe import Experts, MoE, Router, RouterStats, TokenDispatcher

BlockOutput = tuple[Tensor, RouterStats | None]


@dataclass(frozen=True)
class Context:
    """What layers of a pass share: rotary tables of new tokens, mask, valid B S (no padding), cache, dispatcher."""

    rotary: tuple[Tensor, Tensor]
    mask: Mask
    valid: Tensor
    cache: TokenCache | None
    dispatcher: TokenDispatcher


class TransformerBlock(nn.Module):
    """A layer: x + attention(attention_norm(x)), then x + mlp(mlp_norm(x)).

    Layers that share weights hold the same `attention` and the same `mlp` (of a mixture of experts, the same experts);
    norms and biases are each layer's own, and so is its router unless the config shares it.
    """

    def __init__(self, attention: Attention, mlp: MLP | MoE) -> None:
        super().__init__()
        config = attention.config
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.qk_norm = QKNorm(config) if config.qk_norm else None
        size = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv_bias = nn.Parameter(torch.empty(size)) if config.qkv_bias else None
        self.attention = attention
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = mlp

    @property
    def router(self) -> Router | None:
        """The router; None if the MLP is dense."""
        return self.mlp.router if isinstance(self.mlp, MoE) else None

    def shareable(self) -> dict[str, Attention | MLP | Experts]:
        """Return the modules with the matrices, which layers may share, by their name in the block."""
        if isinstance(self.mlp, MLP):
            return {"attention": self.attention, "mlp": self.mlp}
        shared = {} if self.mlp.shared_experts is None else {"mlp.shared_experts": self.mlp.shared_experts}
        return {"attention": self.attention, "mlp.experts": self.mlp.experts, **shared}

    def matrices(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the shareable modules, by their name in the block."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.shareable().items()
            for name, parameter in module.named_parameters()
        }

    def reset_norms(self) -> None:
        for norm in (self.attention_norm, self.qk_norm, self.mlp_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.qkv_bias is not None:
            nn.init.zeros_(self.qkv_bias)

    def reset_matrices(self, deviation: float, output_deviation: float) -> None:
        for module in self.shareable().values():
            module.reset_parameters(deviation, output_deviation)

    def forward(self, x: Tensor, context: Context, layer: int) -> BlockOutput:
        """B S D -> B S D, and the router's statistics if the MLP has experts."""
        normal = self.attention_norm(x)
        rotary, mask, cache = context.rotary, context.mask, context.cache
        x = x + self.attention(normal, self.qk_norm, rotary, mask, cache, layer, self.qkv_bias)
        normal = self.mlp_norm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(normal), None
        y, stats = self.mlp(normal, context.valid, context.dispatcher, layer)
        return x + y, stats


def build_block(
    attention: AttentionConfig, mlp: DenseConfig | ExpertsConfig, first: TransformerBlock | None = None,
    share_router: bool = False, meta_matrices: bool = False,
) -> TransformerBlock:  # fmt: skip
    """Return a block, not yet filled, with own matrices (on `meta` if asked) or those of `first`, maybe its router."""
    width = attention.hidden_size
    router = Router(width, mlp) if isinstance(mlp, ExpertsConfig) else None
    if first is not None:
        network: MLP | MoE = first.mlp
        if isinstance(network, MoE) and router is not None:
            network = MoE(network.router if share_router else router, network.experts, network.shared_experts)
        return TransformerBlock(first.attention, network)
    with torch.device("meta") if meta_matrices else nullcontext():
        own = Attention(attention)
        if isinstance(mlp, DenseConfig):
            network = MLP(width, mlp)
        else:
            assert router is not None
            shared = None if mlp.shared is None else MLP(width, mlp.shared)
            network = MoE(router, Experts(width, mlp), shared)
    return TransformerBlock(own, network)
