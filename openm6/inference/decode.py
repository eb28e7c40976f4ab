"""One decoder step: a new token of each of many sequences through all layers, its keys and values into the cache.

The same function as `Backbone.forward` with a cache, which is the reference in the tests, for one token per sequence.
Nothing here waits for the device or allocates by what the rows hold, so that a CUDA graph can replay it; with the same
number of rows, a row's bits do not depend on the others. Weights may be int8: decoding reads every weight for each
token, and int8 has a quarter of the bytes of float32. The int8 copies lie beside the weights, which prompts, images
and audio go on using.
"""

# Shapes: B rows, T keys, D hidden size, H query heads, G key-value heads, M = H/G, d size of a head, E experts,
# K choices, F hidden, P first product, V vocabulary, C positions of a slot, O outputs, I inputs, R rows by expert

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.core.errors import ConfigError
from openm6.modalities.text import Text
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.models.omni import Omni
from openm6.nn.block import TransformerBlock
from openm6.nn.cache import SlotCache
from openm6.nn.config import ExpertsConfig
from openm6.nn.layers import MLP, activate
from openm6.nn.moe import MoE
from openm6.ops.matmul import grouped_mm
from openm6.ops.moe import choose_experts, dropless_permutation, permute, unpermute
from openm6.ops.pointwise import rms_norm, rotary_table, rotate

# Up to so many rows a GPU reads every expert's weights anyway, and multiplies all rows by all of them in less time.
ALL_EXPERTS_ROWS = 170
# On a CPU the multiplications count: if half of them are wasted both ways take as long, if three of four twice as long.
ALL_EXPERTS_WASTE = 2

Precision = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class TextHead:
    """What generates text: a backbone, its token embedding and its head (V D each), the id that closes a text.

    `suppress_tokens` (V bool) are ids that are never generated, or None.
    """

    backbone: Backbone
    embedding: Tensor
    head: Tensor
    end: int | None
    suppress_tokens: Tensor | None = None

    @classmethod
    def of(cls, omni: Omni, text: Text) -> TextHead:
        """Return the text side of a multimodal model."""
        weight = omni.text.embedding.weight
        token = torch.arange(text.vocab_size, device=weight.device)
        suppress_tokens = (token >= text.first_special) & (token != text.end)
        return cls(omni.backbone, weight, weight, text.end, suppress_tokens)


class DecodeStep:
    """Runs one new token of each row through all layers; row b uses slot b of the cache.

    `fixed` keeps every shape independent of what the rows hold.
    """

    def __init__(
        self, text_head: TextHead, cache: SlotCache, precision: Precision = "float32", fixed: bool = False
    ) -> None:
        self.text_head, self.cache = text_head, cache
        self.backbone = text_head.backbone
        self.config = self.backbone.config
        self.precision, self.fixed = precision, fixed
        if self.backbone.executor.offloaded and precision == "int8":
            raise ConfigError("int8 weights stay on the device: leave out num_gpu_layers, or take float32 or bfloat16")
        self._layers: dict[tuple[int, Tensor], _Layer] = {}
        self.head = matrix_of(text_head.head, precision)
        position = torch.arange(cache.capacity + 1, device=cache.keys.device)[:, None].expand(-1, 3)
        cosine, sine = rotary_table(position[None], self.config.rope_theta, self.config.sections)
        self.cosine, self.sine = cosine[0], sine[0]  # C+1 1 d/2

    def __call__(self, token: Tensor, position: Tensor, length: Tensor, longest: int) -> Tensor:
        """Logits of the token after `token`, which stands at `position` and is the last of `length` + 1 in its slot.

        `longest` bounds the keys of a row and must exceed every length.  # B, B, B -> B V
        """
        x = F.embedding(token, self.text_head.embedding)  # B D
        logits = self.head(self.states(x, position, length, longest)).float()
        suppress_tokens = self.text_head.suppress_tokens
        return logits if suppress_tokens is None else logits.masked_fill_(suppress_tokens, float("-inf"))

    def states(self, x: Tensor, position: Tensor, length: Tensor, longest: int) -> Tensor:
        """Hidden states after the final norm of one embedded token per row.  # B D, B, B -> B D"""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        cosine, sine = self.cosine[position], self.sine[position]  # B 1 d/2
        slot = torch.arange(len(x), device=x.device)
        hidden = torch.arange(longest, device=x.device) > length[:, None]  # B T
        mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill_(hidden, float("-inf"))
        mask = mask[:, None, None, :].expand(-1, -1, heads // kv_heads, -1)  # B 1 M T
        for layer_index in range(self.config.num_layers):
            layer = self._layer(layer_index)
            qkv = layer.qkv(layer.block.attention_norm(x)).unflatten(-1, (-1, self.config.head_dim))  # B H+2G d
            qk, value = qkv.split([heads + kv_heads, kv_heads], dim=1)
            if layer.qk_norm is not None:
                qk = rms_norm(qk, layer.qk_norm, self.config.norm_eps)
            query, key = rotate(qk, cosine, sine).split([heads, kv_heads], dim=1)
            keys, values = self.cache.keys[layer_index], self.cache.values[layer_index]  # S C G d
            keys.index_put_((slot, length), key.to(keys.dtype))
            values.index_put_((slot, length), value.to(values.dtype))
            keys, values = (part[: len(x), :longest].transpose(1, 2) for part in (keys, values))  # B G T d
            # The heads of a group become queries of one head: no copies of keys, and no slow path for groups.
            grouped = query.unflatten(1, (kv_heads, -1)).to(keys.dtype)  # B G M d
            attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
            x = x + layer.output(attended.flatten(1).to(x.dtype))
            x = x + layer.mlp(layer.block.mlp_norm(x))
        states: Tensor = self.backbone.final_norm(x)
        return states

    def _layer(self, layer_index: int) -> _Layer:
        """A layer on the weights that are on the device now; offloaded ones may be in one of several buffers."""
        block = self.backbone.block(layer_index)
        key = layer_index, block.attention.qkv
        if key not in self._layers:
            self._layers[key] = _Layer(block, self.config, self.precision, self.fixed)
        return self._layers[key]


class _Layer:
    """References to the weights of one layer, quantized if asked for."""

    def __init__(self, block: TransformerBlock, config: BackboneConfig, precision: Precision, fixed: bool) -> None:
        norms, mlp = block.qk_norm, block.mlp
        self.block = block
        self.qk_norm = None if norms is None else norms(config.num_heads, config.num_kv_heads).detach()  # H+G d
        self.qkv = matrix_of(block.attention.qkv, precision)
        self.output = matrix_of(block.attention.output, precision)
        self.mlp = _Sparse(mlp, precision, fixed) if isinstance(mlp, MoE) else _dense(mlp, precision)


def _dense(part: MLP, precision: Precision) -> Matrix:
    """A dense feed-forward network, or the shared experts."""
    up, down = matrix_of(part.up, precision), matrix_of(part.down, precision)
    return lambda x: down(activate(up(x), part.config.hidden_act))


class _Sparse:
    """A mixture of experts: every expert on every row, or rows sorted by expert."""

    def __init__(self, part: MoE, precision: Precision, fixed: bool) -> None:
        experts, shared = part.experts, part.shared_experts
        self.config: ExpertsConfig = experts.config
        self.router, self.bias = part.router.weight.detach().float(), part.router.bias  # E D in fp32, E
        stack = QuantizedStack if precision == "int8" else PlainStack
        self.up, self.down = stack(experts.up.detach()), stack(experts.down.detach())  # E D P, E F D
        self.shared = None if shared is None else _dense(shared, precision)
        self.fixed = fixed
        # Sorting can be recorded in a graph if it is one kernel, in bfloat16 alone.
        self.captured = isinstance(self.up, PlainStack) and experts.up.dtype == torch.bfloat16

    def __call__(self, x: Tensor) -> Tensor:
        config = self.config
        logits = F.linear(x.float(), self.router)  # B E
        prototypes = config.num_prototypes is not None
        gate, chosen, _ = choose_experts(logits, self.bias, config.experts_per_token, prototypes, config.norm_topk_prob)
        by_all = self.fixed or meets_all_experts(
            len(x), x.is_cuda, self.captured, config.num_experts, config.experts_per_token
        )
        if by_all:
            y = self._by_all(x, gate, chosen)
        else:
            plan = dropless_permutation(chosen, config.num_experts)
            hidden = activate(self.up.grouped(permute(x, plan), plan.counts), config.hidden_act)
            y = unpermute(self.down.grouped(hidden, plan.counts), gate, plan)
        return y if self.shared is None else y + self.shared(x)

    def _by_all(self, x: Tensor, gate: Tensor, chosen: Tensor) -> Tensor:
        """Σ_e gate_e · E_e(x) with a gate of 0 for those not chosen: fixed shapes, no sorting."""
        experts = self.config.num_experts
        weight = torch.zeros(len(x), experts, device=x.device).scatter_(1, chosen, gate)  # B E
        # E B D -> E B P -> E B F
        hidden = activate(self.up.each(x.expand(experts, -1, -1)), self.config.hidden_act)
        hidden = hidden * weight.t().unsqueeze(-1).to(x.dtype)
        if isinstance(self.down, PlainStack):  # one product does the sum, too
            return hidden.transpose(0, 1).flatten(1) @ self.down.weight.flatten(0, 1)  # B E·F -> B D
        return self.down.each(hidden).sum(0)  # E B D -> B D


def meets_all_experts(rows: int, on_gpu: bool, captured: bool, experts: int, choices: int) -> bool:
    """Whether every row is multiplied by all experts, or rows are sorted by their own.

    On a GPU a pass is recorded in a graph, which cannot wait for a count; sorting needs one unless it is `captured`.
    """
    if on_gpu:
        return not captured or rows <= ALL_EXPERTS_ROWS
    return experts <= ALL_EXPERTS_WASTE * choices


class QuantizedMatrix:
    """Each row of the weight as int8 and the scale that makes its largest entry 127."""

    def __init__(self, weight: Tensor) -> None:
        wide = weight.detach().float()
        scale = wide.abs().amax(1).clamp(min=1e-12) / 127
        self.rows = (wide / scale[:, None]).round().to(torch.int8).contiguous()  # O I
        self.scale = scale.to(weight.dtype)  # O

    def __call__(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.rows, self.scale)


class PlainStack:
    """A matrix for each expert, E I O, as it is."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def each(self, x: Tensor) -> Tensor:
        """Rows of every expert times its matrix.  # E B I -> E B O"""
        return torch.bmm(x, self.weight)

    def grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Consecutive groups of rows, each times the matrix of its own expert.  # R I, E -> R O"""
        return grouped_mm(rows, self.weight, counts)


class QuantizedStack:
    """As `PlainStack`, each matrix as int8 with a scale for each output."""

    def __init__(self, weight: Tensor) -> None:
        self.matrices = [QuantizedMatrix(matrix.t()) for matrix in weight]

    def each(self, x: Tensor) -> Tensor:
        return torch.stack([matrix(rows) for matrix, rows in zip(self.matrices, x.unbind(), strict=True)])

    def grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        parts = rows.split(counts.tolist())
        return torch.cat([matrix(part) for matrix, part in zip(self.matrices, parts, strict=True) if len(part)])


Matrix = Callable[[Tensor], Tensor]


def matrix_of(weight: Tensor, precision: Precision) -> Matrix:
    """Return x -> x · weightᵀ for a weight O I; int8 keeps a quantized copy, the other precisions the weight itself."""
    return QuantizedMatrix(weight) if precision == "int8" else partial(F.linear, weight=weight.detach())
