"""One token for each of many rows at once: the backbone's layers written out for a single new token.

The twin of `Backbone.forward` with a cache, which stays the reference. Nothing here sorts rows, waits for a device,
or allocates by what the rows hold, so a CUDA graph can replay it; with the same number of rows, a row's bits do not
depend on its neighbours.
"""

# Letters: B rows, T keys, D width, H query heads, G key-value heads, M = H/G, d size of a head, E experts, K choices,
# F hidden, P first product, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.base.errors import ConfigError
from openm6.generate.matrices import Matrix, PlainStack, Precision, Stack, matrix_of, stack_of
from openm6.modalities.text import Text
from openm6.models.backbone import Backbone
from openm6.models.omni import Omni
from openm6.nn.block import Block, LayerParts
from openm6.nn.config import ExpertsConfig
from openm6.nn.experts import Experts
from openm6.nn.slots import SlotCache
from openm6.ops.rotary import rotary_table
from openm6.ops.routing import choose_prototypes, choose_top_k, combine_rows, plan_dropless, send_rows

# Up to so many rows a GPU reads every expert's weights anyway, and multiplies all rows by all of them in less time.
ALL_EXPERTS_ROWS = 170
# On a CPU the multiplications count: with half of them in vain it is a draw, with three of four twice as slow.
ALL_EXPERTS_WASTE = 2


@dataclass(frozen=True)
class Speaker:
    """What writes text: a backbone, its word embedding and its head (V D each), the ids that open and close a text.

    mute: V bool, ids that are never said, or None
    """

    backbone: Backbone
    embedding: Tensor
    head: Tensor
    start: int | None
    end: int | None
    mute: Tensor | None = None

    @classmethod
    def of(cls, omni: Omni, text: Text) -> Speaker:
        """The text side of a multimodal model."""
        weight = omni.text.embedding.weight
        token = torch.arange(text.vocabulary_size, device=weight.device)
        mute = (token >= text.first_mark) & (token != text.end)
        return cls(omni.backbone, weight, weight, text.start, text.end, mute)

    def new_slots(self, slots: int, room: int) -> SlotCache:
        """An empty cache for this backbone."""
        config, weight = self.backbone.config, self.backbone.final_norm.weight
        return SlotCache(
            config.num_layers, slots, room, config.num_kv_heads, config.head_dim, weight.device, weight.dtype
        )


@dataclass(frozen=True)
class _FeedForward:
    """A dense part, or the shared experts."""

    up: Matrix
    down: Matrix
    activate: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.up(x)))


@dataclass(frozen=True)
class _Experts:
    """A sparse part: every expert on every row, or rows sorted by expert."""

    config: ExpertsConfig
    router: Tensor  # E D, fp32
    bias: Tensor | None
    up: Stack  # E D P
    down: Stack  # E F D
    shared: _FeedForward | None
    activate: Callable[[Tensor], Tensor]
    fixed: bool

    def __call__(self, x: Tensor) -> Tensor:
        config = self.config
        logits = F.linear(x.float(), self.router)  # B E
        if config.num_prototypes is not None:
            gate, chosen, _ = choose_prototypes(logits, self.bias, config.num_prototypes)
        else:
            gate, chosen, _ = choose_top_k(logits, self.bias, config.choices, config.normalise_gates)
        by_all = self.fixed or meets_all_experts(
            len(x), x.is_cuda, self.captured, config.num_experts, config.choices
        )
        y = self._by_all(x, gate, chosen) if by_all else self._sorted(x, gate, chosen)
        return y if self.shared is None else y + self.shared(x)

    @property
    def captured(self) -> bool:
        """Whether the sorted way can be recorded in a graph: it is one kernel, in bfloat16 alone."""
        return isinstance(self.up, PlainStack) and self.up.weight.dtype == torch.bfloat16

    def _by_all(self, x: Tensor, gate: Tensor, chosen: Tensor) -> Tensor:
        """Σ_e gate_e · E_e(x) with a gate of 0 for those not chosen: fixed shapes, no sorting."""
        experts = self.config.num_experts
        weight = torch.zeros(len(x), experts, device=x.device).scatter_(1, chosen, gate)  # B E
        hidden = self.activate(self.up.each(x.expand(experts, -1, -1)))  # E B D -> E B P -> E B F
        hidden = hidden * weight.t().unsqueeze(-1).to(x.dtype)
        if isinstance(self.down, PlainStack):  # one product does the sum, too
            return hidden.transpose(0, 1).flatten(1) @ self.down.weight.flatten(0, 1)  # B E·F -> B D
        return self.down.each(hidden).sum(0)  # E B D -> B D

    def _sorted(self, x: Tensor, gate: Tensor, chosen: Tensor) -> Tensor:
        plan = plan_dropless(chosen, self.config.num_experts)
        hidden = self.activate(self.up.grouped(send_rows(x, plan), plan.counts))
        return combine_rows(self.down.grouped(hidden, plan.counts), gate, plan)


def meets_all_experts(rows: int, on_gpu: bool, captured: bool, experts: int, choices: int) -> bool:
    """Whether every row is multiplied by all experts, or rows are sorted by their own.

    On a GPU a pass is recorded in a graph, which cannot wait for a count; sorting needs one unless it is `captured`.
    """
    if on_gpu:
        return not captured or rows <= ALL_EXPERTS_ROWS
    return experts <= ALL_EXPERTS_WASTE * choices


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor
    head_norms: Tensor | None  # H+G d
    qkv: Matrix
    output: Matrix
    feed_forward_norm: Tensor
    feed_forward: _FeedForward | _Experts


class DecodeStep:
    """Runs one new token of each row through all layers, its keys and values into the row's slot."""

    def __init__(
        self, speaker: Speaker, cache: SlotCache, precision: Precision = "float32", fixed: bool = False
    ) -> None:
        """`fixed` keeps every shape independent of what the rows hold."""
        self.speaker, self.cache = speaker, cache
        backbone = speaker.backbone
        self.config = backbone.config
        self.precision, self.fixed = precision, fixed
        if backbone.source is not None and precision == "int8":
            raise ConfigError(
                "int8 weights stay on the device: leave out resident, or take float32 or bfloat16"
            )
        self._layers: dict[tuple[int, Block], _Layer] = {}
        self.final_norm = backbone.final_norm.weight
        self.head = matrix_of(speaker.head, precision)
        place = torch.arange(cache.room + 1, device=cache.keys.device)[:, None].expand(-1, 3)
        cosine, sine = rotary_table(place[None], self.config.rope_theta, self.config.sections)
        self.cosine, self.sine = cosine[0], sine[0]  # C+1 1 d/2

    def __call__(self, token: Tensor, place: Tensor, length: Tensor, longest: int) -> Tensor:
        """Scores of the token after `token`, which stands at `place` and is the `length`-th of its slot (from 0).

        Row b uses slot b; `longest` bounds the keys to look at and must exceed every length.  # B, B, B -> B V
        """
        x = F.embedding(token, self.speaker.embedding)  # B D
        logits = self.head(self.states(x, place, length, longest)).float()
        mute = self.speaker.mute
        return logits if mute is None else logits.masked_fill_(mute, float("-inf"))

    def states(self, x: Tensor, place: Tensor, length: Tensor, longest: int) -> Tensor:
        """Hidden states after the final norm of one embedded token a row.  # B D, B, B -> B D"""
        turn = self.cosine[place], self.sine[place]  # B 1 d/2
        rows = torch.arange(len(x), device=x.device)
        seen = torch.arange(longest, device=x.device) <= length[:, None]  # B T
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill_(~seen, float("-inf"))
        mask = mask[:, None, None, :]
        for number in range(self.config.num_layers):
            layer = self._layer(number)
            normal = _norm(x, layer.attention_norm, self.config.norm_eps)
            x = x + self._attend(normal, layer, number, turn, mask, (rows, length))
            x = x + layer.feed_forward(_norm(x, layer.feed_forward_norm, self.config.norm_eps))
        return _norm(x, self.final_norm, self.config.norm_eps)

    def _layer(self, number: int) -> _Layer:
        """A layer on the weights that stand on the device now; a streamed block may come in one of several places."""
        block = self.speaker.backbone.block(number)
        if (number, block) not in self._layers:
            self._layers[number, block] = _layer_of(
                self.speaker.backbone, number, block, self.precision, self.fixed
            )
        return self._layers[number, block]

    def _attend(
        self,
        x: Tensor,
        layer: _Layer,
        number: int,
        turn: tuple[Tensor, Tensor],
        mask: Tensor,
        place: tuple[Tensor, Tensor],
    ) -> Tensor:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = layer.qkv(x).unflatten(-1, (-1, self.config.head_dim))  # B D -> B H+2G d
        qk, value = qkv.split([heads + kv_heads, kv_heads], dim=1)
        if layer.head_norms is not None:
            qk = _norm(qk, layer.head_norms, self.config.norm_eps)
        query, key = _turned(qk, *turn).split([heads, kv_heads], dim=1)
        keys, values = self.cache.keys[number], self.cache.values[number]  # S C G d
        keys.index_put_(place, key.to(keys.dtype))
        values.index_put_(place, value.to(values.dtype))
        longest = mask.shape[-1]
        keys, values = (part[: len(x), :longest].transpose(1, 2) for part in (keys, values))  # B G T d
        # The heads of a group become queries of one head: no copies of keys, and no slow path for groups.
        grouped = query.unflatten(1, (kv_heads, -1)).to(keys.dtype)  # B G M d
        mask = mask.expand(-1, -1, grouped.shape[2], -1)
        answer = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return layer.output(answer.flatten(1).to(x.dtype))


def _layer_of(backbone: Backbone, layer: int, block: Block, precision: Precision, fixed: bool) -> _Layer:
    """References to the weights of a layer, quantised where asked."""
    config = backbone.config
    parts = cast(LayerParts, backbone.layers[layer])
    norms = parts.head_norms
    part = block.feed_forward
    feed_forward: _FeedForward | _Experts
    if isinstance(part, Experts):
        feed_forward = _experts_of(backbone, layer, part, precision, fixed)
    else:
        feed_forward = _dense_of(part.up, part.down, part.config.ffn, precision)
    return _Layer(
        attention_norm=parts.attention_norm.weight,
        head_norms=None if norms is None else norms(config.num_heads, config.num_kv_heads).detach(),
        qkv=matrix_of(block.attention.qkv, precision),
        output=matrix_of(block.attention.output, precision),
        feed_forward_norm=parts.feed_forward_norm.weight,
        feed_forward=feed_forward,
    )


def _experts_of(backbone: Backbone, layer: int, part: Experts, precision: Precision, fixed: bool) -> _Experts:
    router = backbone.router(layer)
    assert router is not None
    config = part.config
    shared = None
    if part.shared is not None:
        shared = _dense_of(part.shared.up, part.shared.down, config.ffn, precision)
    return _Experts(
        config=config,
        router=router.weight.detach().float(),
        bias=router.bias,
        up=stack_of(part.up, precision),
        down=stack_of(part.down, precision),
        shared=shared,
        activate=_activation(config.ffn),
        fixed=fixed,
    )


def _dense_of(up: Tensor, down: Tensor, ffn: str, precision: Precision) -> _FeedForward:
    return _FeedForward(matrix_of(up, precision), matrix_of(down, precision), _activation(ffn))


def _activation(ffn: str) -> Callable[[Tensor], Tensor]:
    return _swiglu if ffn == "swiglu" else F.gelu


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm`, without what a gradient would need."""
    wide = x.float()
    inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * inverse * weight).to(x.dtype)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As `rotate`, for single tokens: B H d -> B H d."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(x.dtype)
