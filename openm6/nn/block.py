"""One layer of the transformer: attention and an MLP, each behind a norm and added to the residual stream."""

# Dimensions: B rows, S tokens, D width

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from openm6.nn.attention import Attention, Mask, QKNorm
from openm6.nn.cache import TokenCache
from openm6.nn.config import AttentionConfig, DenseConfig, ExpertsConfig, LoraConfig, ModalityExpertsConfig
from openm6.nn.layers import MLP, LowRank, RMSNorm, UpdatesOfSome
from openm6.nn.moe import Experts, MoE, Router, RouterStats, TokenDispatcher

BlockOutput = tuple[Tensor, RouterStats | None]


@dataclass(frozen=True)
class Context:
    """What layers of a pass share: rotary tables of new tokens, mask, valid B S (no padding), cache, dispatcher.

    others: for each of the modality experts, the tokens of the flattened B S that pass them, or None; empty: no such
    """

    rotary: tuple[Tensor, Tensor]
    mask: Mask
    valid: Tensor
    cache: TokenCache | None
    dispatcher: TokenDispatcher
    others: Sequence[Tensor | None] = ()


class ModalityExperts(MoE):
    """Experts for the tokens of some modalities beside the layer's own network, which is their shared expert.

    `attention`: updates of the layer's attention for these tokens, if there are any.
    """

    def __init__(self, config: ModalityExpertsConfig, attention: Attention) -> None:
        width = attention.config.hidden_size
        super().__init__(Router(width, config), Experts(width, config), None)
        self.attention = nn.ModuleDict() if config.lora is None else _updates_of(attention, config.lora)


class TransformerBlock(nn.Module):
    """A layer: x + attention(attention_norm(x)), then x + mlp(mlp_norm(x)).

    Layers that share weights hold the same `attention` and the same `mlp` (of a mixture of experts, the same experts);
    norms and biases are each layer's own, and so is its router unless the config shares it.
    """

    def __init__(self, attention: Attention, mlp: MLP | MoE, modality_experts: Iterable[ModalityExperts] = ()) -> None:
        super().__init__()
        config = attention.config
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.qk_norm = QKNorm(config) if config.qk_norm else None
        size = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv_bias = nn.Parameter(torch.empty(size)) if config.qkv_bias else None
        self.attention = attention
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = mlp
        self.modality_experts = nn.ModuleList(modality_experts)

    @property
    def router(self) -> Router | None:
        """The router of the MLP or, if that is dense, of the first modality experts; None if there are none."""
        sparse = [one for one in (self.mlp, *self.modality_experts) if isinstance(one, MoE)]
        return sparse[0].router if sparse else None

    def shareable(self) -> dict[str, Attention | MLP | Experts]:
        """Return the modules with the matrices, which layers may share, by their name in the block."""
        if isinstance(self.mlp, MLP):
            return {"attention": self.attention, "mlp": self.mlp}
        shared = {} if self.mlp.shared_experts is None else {"mlp.shared_experts": self.mlp.shared_experts}
        return {"attention": self.attention, "mlp.experts": self.mlp.experts, **shared}

    def matrices(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the shareable modules but low-rank updates, by their name in the block."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.shareable().items()
            for name, parameter in module.named_parameters(recurse=False)
        }

    def place_matrices(self, device: str) -> None:
        """Move the matrices to or from `meta`, without their values; low-rank updates stay where they are."""
        for module in self.shareable().values():
            for name, matrix in list(module.named_parameters(recurse=False)):
                if matrix.is_meta or device == "meta":
                    setattr(module, name, nn.Parameter(torch.empty_like(matrix, device=device), matrix.requires_grad))

    def take_lora(self) -> dict[str, LowRank]:
        """Remove the low-rank updates; return them by the name of their matrix in the block."""
        found = {f"{prefix}.{name}": one for prefix, x in self.shareable().items() for name, one in x.lora.items()}
        for module in self.shareable().values():
            module.lora = nn.ModuleDict()
        return cast(dict[str, LowRank], found)

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
        rotary, mask, cache = context.rotary, context.mask, context.cache
        added = zip(self.modality_experts, context.others, strict=False)
        passed = [(cast(ModalityExperts, experts), tokens) for experts, tokens in added if tokens is not None]
        some = [UpdatesOfSome(experts.attention, tokens) for experts, tokens in passed]
        normal = self.attention_norm(x)
        x = x + self.attention(normal, self.qk_norm, rotary, mask, cache, layer, self.qkv_bias, some)
        y, stats = self._feed_forward(self.mlp_norm(x), passed, context, layer)
        return x + y, stats

    def _feed_forward(
        self, x: Tensor, passed: Sequence[tuple[ModalityExperts, Tensor]], context: Context, layer: int
    ) -> BlockOutput:
        """The output of the layer's own network, with that of experts added at the tokens that pass them.

        Without such tokens it is computed as without experts. The statistics are those of `router`.
        """
        stats = None
        if isinstance(self.mlp, MoE):
            y, stats = self.mlp(x, context.valid, context.dispatcher, layer)
        else:
            y = self.mlp(x)
        side_loss: Tensor | float = 0.0
        for experts, tokens in passed:
            rows, valid = x.flatten(0, 1)[tokens], context.valid.flatten()[tokens]
            part, own = experts(rows[None], valid[None], context.dispatcher, layer)
            y = y.flatten(0, 1).index_add(0, tokens, part[0].to(y.dtype)).view_as(x)
            if experts.router is self.router:
                stats = own
            else:
                side_loss = side_loss + own.side_loss
        if stats is None and self.router is not None:
            none = x.new_zeros(())
            stats = RouterStats(layer, x.new_zeros(self.router.config.num_experts), none, none)
        if passed and stats is not None:
            stats = replace(stats, side_loss=stats.side_loss + side_loss)
        return y, stats


def build_block(
    attention: AttentionConfig, mlp: DenseConfig | ExpertsConfig, first: TransformerBlock | None = None,
    share_router: bool = False, meta_matrices: bool = False, lora: LoraConfig | None = None,
    modality_experts: Sequence[ModalityExpertsConfig] = (),
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
    others = [ModalityExperts(config, own) for config in modality_experts]
    if lora is not None:
        _add_lora(lora, own, network.experts if isinstance(network, MoE) else network)
    return TransformerBlock(own, network, others)


def _add_lora(config: LoraConfig, attention: Attention, network: MLP | Experts) -> None:
    hidden = network.config.intermediate_size
    gate = {"gate_proj": hidden} if network.config.hidden_act == "swiglu" else {}
    attention.lora = _updates_of(attention, config)
    up = LowRank(config, network.up, {**gate, "up_proj": hidden})
    down = LowRank(config, network.down, {"down_proj": attention.config.hidden_size})
    network.lora = _with_targets({"up": up, "down": down})


def _updates_of(attention: Attention, config: LoraConfig) -> nn.ModuleDict:
    sizes = attention.config
    key = sizes.num_kv_heads * sizes.head_dim
    projections = {"q_proj": sizes.num_heads * sizes.head_dim, "k_proj": key, "v_proj": key}
    output = LowRank(config, attention.output, {"o_proj": sizes.hidden_size})
    return _with_targets({"qkv": LowRank(config, attention.qkv, projections), "output": output})


def _with_targets(updates: dict[str, LowRank]) -> nn.ModuleDict:
    """Return those that update something: others would only take time."""
    return nn.ModuleDict({name: update for name, update in updates.items() if update.a})
