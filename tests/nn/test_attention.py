"""Attention against softmax written out, head by head."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from openm6.core.log import get_log
from openm6.nn import attention
from openm6.nn.attention import Attention, FlexAttention, QKNorm, attend
from openm6.nn.config import AttentionConfig
from openm6.ops.pointwise import rotary_table, rotate
from openm6.ops.sequence import additive_mask, block_mask, causal_meta, join, visible
from tests.sequences import padding_meta

CONFIG = AttentionConfig(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=8, norm_eps=1e-5)


def naive_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """B S H d, B T G d: query head h reads key head h // (H / G)."""
    share = query.shape[2] // key.shape[2]
    heads = []
    for h in range(query.shape[2]):
        score = query[:, :, h] @ key[:, :, h // share].transpose(1, 2) / math.sqrt(query.shape[-1])
        weight = score.masked_fill(~mask[:, 0], float("-inf")).softmax(-1)
        heads.append(weight @ value[:, :, h // share])
    return torch.stack(heads, dim=2)


@pytest.mark.parametrize("additive", [True, False])
def test_attend_equals_softmax_written_out(additive):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 5, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    mask = visible(causal_meta(2, 5, start=4), causal_meta(2, 9))
    given = additive_mask(mask, torch.float32) if additive else mask
    torch.testing.assert_close(attend(query, key, value, given), naive_attend(query, key, value, mask))


def test_layer_equals_its_parts():
    torch.manual_seed(1)
    layer, norms = Attention(CONFIG), QKNorm(CONFIG)
    layer.reset_parameters(0.3, 0.3)
    with torch.no_grad():
        norms.query.uniform_(0.5, 2)
        norms.key.uniform_(0.5, 2)
    x, meta = torch.randn(2, 6, 24), causal_meta(2, 6)
    table = rotary_table(meta.positions, 100.0, (2, 1, 1))
    mask = visible(meta, meta)
    query, key, value = (
        part.unflatten(-1, (-1, 8)) for part in (x @ layer.qkv.t()).split([4 * 8, 2 * 8, 2 * 8], dim=-1)
    )

    def ready(part: Tensor, weight: Tensor) -> Tensor:
        normal = part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return rotate(normal * weight, *table)

    answer = naive_attend(ready(query, norms.query), ready(key, norms.key), value, mask)
    torch.testing.assert_close(layer(x, norms, table, mask, None, 0), answer.flatten(2) @ layer.output.t())


def test_without_qk_norm_queries_keep_their_length():
    torch.manual_seed(2)
    layer = Attention(CONFIG)
    layer.reset_parameters(0.3, 0.3)
    meta = causal_meta(1, 6)
    table = rotary_table(meta.positions, 100.0, (2, 1, 1))
    x, mask, norms = torch.randn(1, 6, 24), visible(meta, meta), QKNorm(CONFIG)
    norms.reset_parameters()
    assert not torch.allclose(layer(x, None, table, mask, None, 0), layer(x, norms, table, mask, None, 0))


def test_rows_of_any_length_are_padded_to_whole_blocks(monkeypatch):
    """The forward pass alone, which is all that a CPU has."""
    compiled = torch.compile(flex_attention, backend="aot_eager")
    run = lambda query, key, value, mask: compiled(query, key, value, block_mask=mask, enable_gqa=True)  # noqa: E731
    monkeypatch.setattr("openm6.nn.attention._flex", lambda: run)
    torch.manual_seed(0)
    meta = join([causal_meta(2, 9), padding_meta(2, 4), causal_meta(2, 6)])
    query, key, value = torch.randn(2, 19, 4, 16), torch.randn(2, 19, 2, 16), torch.randn(2, 19, 2, 16)
    ours, theirs = (attend(query, key, value, mask) for mask in (block_mask(meta), visible(meta, meta)))
    # Padding, which nothing reads, also attends to what was added.
    torch.testing.assert_close(ours[meta.valid], theirs[meta.valid])
    assert ours.shape == theirs.shape and ours.isfinite().all()


@pytest.mark.parametrize("fails", ["backward", "later"])
def test_flex_attention_that_fails_becomes_dense_attention(fails, monkeypatch, caplog):
    """A CPU has no gradient for it, which the first pass of a shape finds out; here a later shape fails as well."""
    flex = FlexAttention()
    monkeypatch.setattr(attention, "_flex", lambda: flex)
    meta = join([causal_meta(1, 200), padding_meta(1, 30)])
    if fails == "later":
        run = flex._run

        def failing(query: Tensor, *rest: Tensor, **named: object) -> Tensor:
            if len(query) == 2:
                raise RuntimeError("out of resource: shared memory")
            return run(query, *rest, **named)

        monkeypatch.setattr(flex, "_run", failing)
    with caplog.at_level(logging.WARNING, logger=get_log().name):
        for rows in (1, 2, 2):
            parts = [torch.randn(rows, 230, heads, 16, requires_grad=fails == "backward") for heads in (4, 2, 2)]
            many = type(meta)(*(part.expand(rows, *part.shape[1:]) for part in meta.parts()))
            # Without the padding, of which the mask has more.
            found, expected = (attend(*parts, mask)[:, :200] for mask in (block_mask(many), visible(many, many)))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
            if fails == "backward":
                torch.testing.assert_close(
                    torch.autograd.grad(found.sum(), parts), torch.autograd.grad(expected.sum(), parts)
                )
    assert list(flex.works.values()) == [fails == "later", False]
    (line,) = caplog.messages
    assert line.startswith("attention takes dense masks, which need more memory: FlexAttention failed (")
