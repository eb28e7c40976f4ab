"""Grouped-query attention with one fused query-key-value product."""

# Dimensions: B rows, S queries, T keys, D width, H query heads, G key-value heads, d size of a head

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from openm6.core.log import get_log
from openm6.kernels.probe import failure_of
from openm6.nn.cache import TokenCache
from openm6.nn.config import AttentionConfig
from openm6.nn.layers import Adaptable, UpdatesOfSome
from openm6.ops.attention import QueryBlocks, attend_query_blocks
from openm6.ops.matmul import linear
from openm6.ops.pointwise import rms_norm, rotate

Mask = Tensor | QueryBlocks | BlockMask


class QKNorm(nn.Module):
    """The learned weights of the RMSNorm of queries and keys: one head of each, or with `joint` all of them."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        joint, self.head_dim = config.qk_norm == "joint", config.head_dim
        self.query = nn.Parameter(torch.empty(self.head_dim * (config.num_heads if joint else 1)))
        self.key = nn.Parameter(torch.empty(self.head_dim * (config.num_kv_heads if joint else 1)))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.query)
        nn.init.ones_(self.key)

    def forward(self, num_heads: int, num_kv_heads: int) -> Tensor:
        """One weight for each of the H + G heads, so that queries and keys are normalized in one pass: H+G d."""
        query, key = (weight.view(-1, self.head_dim) for weight in (self.query, self.key))
        return torch.cat([query.expand(num_heads, -1), key.expand(num_kv_heads, -1)])


def normalize_heads(qk: Tensor, weight: Tensor, config: AttentionConfig) -> Tensor:
    """RMSNorm of each head by itself, or of all query heads and of all key heads: ... H+G d."""
    if config.qk_norm != "joint":
        return rms_norm(qk, weight, config.norm_eps)
    sizes = [config.num_heads, config.num_kv_heads]
    pairs = zip(qk.split(sizes, -2), weight.split(sizes), strict=True)
    return torch.cat([rms_norm(x.flatten(-2), w.flatten(), config.norm_eps).view_as(x) for x, w in pairs], -2)


class Attention(Adaptable):
    """Grouped-query attention; `qkv` is q_proj, k_proj and v_proj in one matrix, `output` is o_proj."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = nn.Parameter(torch.empty(heads * config.head_dim, config.hidden_size))  # (H+2G)·d D
        self.output = nn.Parameter(torch.empty(config.hidden_size, config.num_heads * config.head_dim))  # D H·d

    def forward(
        self, x: Tensor, qk_norm: QKNorm | None, rotary: tuple[Tensor, Tensor], mask: Mask,
        cache: TokenCache | None, layer: int, qkv_bias: Tensor | None = None, some: Sequence[UpdatesOfSome] = (),
    ) -> Tensor:  # fmt: skip
        """B S D -> B S D; `rotary` is the table of the S new tokens, `mask` spans all T keys."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = self.updated("qkv", linear(x, self.qkv), x)
        for one in some:
            qkv = one.updated("qkv", qkv, x)
        qkv = qkv if qkv_bias is None else qkv + qkv_bias.to(qkv.dtype)
        qkv = qkv.unflatten(-1, (-1, self.config.head_dim))  # B S H+2G d
        qk, value = qkv.split([heads + kv_heads, kv_heads], dim=2)
        if qk_norm is not None:
            qk = normalize_heads(qk, qk_norm(heads, kv_heads), self.config)
        query, key = rotate(qk, *rotary).split([heads, kv_heads], dim=2)
        if cache is not None:
            key, value = (part.to(query.dtype) for part in cache.write(layer, key, value))  # B T G d
        answer = attend(query, key, value, mask)
        answer = answer.flatten(2)  # B S H·d
        y = self.updated("output", linear(answer, self.output), answer)  # B S D
        for one in some:
            y = one.updated("output", y, answer)
        return y


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Softmax attention under any of the masks: B S H d, B T G d twice -> B S H d."""
    if isinstance(mask, tuple):
        return attend_query_blocks(query, key, value, mask)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # B H S d
    if isinstance(mask, BlockMask):
        length = query.shape[2]
        if missing := mask.seq_lengths[0] - length:  # the mask has whole blocks
            query, key, value = (F.pad(part, (0, 0, 0, missing)) for part in (query, key, value))
        if torch.compiler.is_compiling():
            answer: Any = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
        else:
            answer = _flex()(query, key, value, mask)
        answer = answer[:, :, :length]
    else:
        grouped = query.shape[1] != key.shape[1]
        answer = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)
    return answer.transpose(1, 2)


class FlexAttention:
    """FlexAttention compiled, without which it is slow; dense attention for shapes with which it has failed.

    The first pass of a shape also runs backwards, for itself: torch compiles that pass when it first runs, where a
    failure would end a training step.
    """

    def __init__(self) -> None:
        self.works: dict[tuple[object, ...], bool] = {}  # by shapes, dtype and whether there is a gradient
        self._run: Any = torch.compile(flex_attention)
        self._dense: tuple[BlockMask | None, Tensor] = (None, torch.empty(0))  # of the layers of one pass

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
        """B H S d, B G T d twice -> B H S d."""
        learns = torch.is_grad_enabled() and query.requires_grad
        shape = query.shape, key.shape, query.device, query.dtype, learns
        if shape not in self.works:
            reason = failure_of(functools.partial(self._prove, query, key, value, mask, learns))
            if reason is not None and all(self.works.values()):
                get_log().warning(
                    f"attention takes dense masks, which need more memory: FlexAttention failed ({reason})"
                )
            self.works[shape] = reason is None
        if self.works[shape]:
            return self._run(query, key, value, block_mask=mask, enable_gqa=True)
        if self._dense[0] is not mask:
            self._dense = mask, create_mask(mask.mask_mod, len(query), 1, *mask.seq_lengths, device=str(query.device))
        return F.scaled_dot_product_attention(query, key, value, self._dense[1], enable_gqa=True)

    def _prove(self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, learns: bool) -> bool:
        # Recomputation counts the tensors that a layer keeps; these are not its own.
        with saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
            parts = [part.detach().requires_grad_(learns) for part in (query, key, value)]
            answer = self._run(*parts, block_mask=mask, enable_gqa=True)
            if learns:
                with torch.autocast(query.device.type, enabled=False):  # as in a step
                    torch.autograd.grad(answer, parts, torch.zeros_like(answer))
        return True


_flex = functools.cache(FlexAttention)  # one for the process, made on first use, because importing must cost nothing
