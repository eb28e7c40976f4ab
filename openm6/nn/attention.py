"""Grouped-query attention with one fused query-key-value product."""

# Dimensions: B rows, S queries, T keys, D width, H query heads, G key-value heads, d size of a head

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from openm6.core.log import get_log
from openm6.kernels.probe import failure_of
from openm6.nn.cache import TokenCache
from openm6.nn.config import AttentionConfig
from openm6.nn.layers import fill_normal
from openm6.ops.attention import QueryBlocks, attend_query_blocks
from openm6.ops.matmul import linear
from openm6.ops.pointwise import rms_norm, rotate
from openm6.ops.sequence import BLOCK, CausalMask, block_mask, causal_meta, visible

Mask = Tensor | QueryBlocks | BlockMask | CausalMask


class QKNorm(nn.Module):
    """The learned weights of the RMSNorm of each query and each key head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(head_dim))
        self.key = nn.Parameter(torch.empty(head_dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.query)
        nn.init.ones_(self.key)

    def forward(self, num_heads: int, num_kv_heads: int) -> Tensor:
        """One weight for each of the H + G heads, so that queries and keys are normalised in one pass: H+G d."""
        return torch.cat([self.query.expand(num_heads, -1), self.key.expand(num_kv_heads, -1)])


class Attention(nn.Module):
    """Grouped-query attention; `qkv` is q_proj, k_proj and v_proj in one matrix, `output` is o_proj."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = nn.Parameter(torch.empty(heads * config.head_dim, config.hidden_size))  # (H+2G)·d D
        self.output = nn.Parameter(torch.empty(config.hidden_size, config.num_heads * config.head_dim))  # D H·d

    def reset_parameters(self, deviation: float, output_deviation: float) -> None:
        fill_normal(self.qkv, deviation)
        fill_normal(self.output, output_deviation)

    def forward(
        self,
        x: Tensor,
        qk_norm: QKNorm | None,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        cache: TokenCache | None,
        layer: int,
    ) -> Tensor:
        """B S D -> B S D; `rotary` is the table of the S new tokens, `mask` spans all T keys."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = linear(x, self.qkv).unflatten(-1, (-1, self.config.head_dim))  # B S D -> B S H+2G d
        qk, value = qkv.split([heads + kv_heads, kv_heads], dim=2)
        if qk_norm is not None:
            qk = rms_norm(qk, qk_norm(heads, kv_heads), self.config.norm_eps)
        query, key = rotate(qk, *rotary).split([heads, kv_heads], dim=2)
        if cache is not None:
            key, value = (part.to(query.dtype) for part in cache.write(layer, key, value))  # B T G d
        answer = attend(query, key, value, mask)
        return linear(answer.flatten(2), self.output)  # B S H·d -> B S D


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Softmax attention under any of the masks: B S H d, B T G d twice -> B S H d."""
    if isinstance(mask, QueryBlocks):
        return attend_query_blocks(query, key, value, mask)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # B H S d
    if isinstance(mask, BlockMask):
        flex: Any = flex_attention if torch.compiler.is_compiling() else _flex()
        answer = flex(query, key, value, block_mask=mask, enable_gqa=True)
    else:
        causal, given = (True, None) if isinstance(mask, CausalMask) else (False, mask)
        grouped = query.shape[1] != key.shape[1]
        answer = F.scaled_dot_product_attention(query, key, value, given, is_causal=causal, enable_gqa=grouped)
    return answer.transpose(1, 2)


@functools.cache
def _flex() -> Callable[..., Tensor]:
    """Return FlexAttention compiled, without which it is slow; on first use, because importing must cost nothing."""
    return torch.compile(flex_attention)


@functools.cache
def flex_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Try FlexAttention and its gradient once against a dense mask; log why it fails if it does."""
    reason = failure_of(functools.partial(_check_flex, device, dtype, head_dim))
    if reason is not None:
        get_log().warning(f"attention uses dense masks, which take more memory: FlexAttention failed ({reason})")
    return reason is None


def _check_flex(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    # Outside of what surrounds the first call: evaluation without gradients, autocast.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        meta = causal_meta(1, BLOCK, device=device)
        parts = [torch.linspace(-1, 1, BLOCK * 2 * head_dim, device=device, dtype=dtype) for _ in range(3)]
        query, key, value = (part.view(1, BLOCK, 2, head_dim).requires_grad_() for part in parts)
        found = []
        for mask in (block_mask(meta), visible(meta, meta)):
            answer = attend(query, key, value, mask)
            found.append((answer, *torch.autograd.grad(answer.square().sum(), (query, key, value))))
        return all(torch.allclose(ours, theirs, rtol=0.1, atol=0.1) for ours, theirs in zip(*found, strict=True))
