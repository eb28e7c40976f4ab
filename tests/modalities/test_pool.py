"""Pooling: sides of a pair do not see each other, pairs are judged both ways, a learned scale stays bounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm6.modalities.batch import build_pair, build_sequence
from openm6.modalities.interface import Part
from openm6.modalities.pool import MAX_SCALE, POOL, PoolAdapter, PoolConfig, pooled
from openm6.modalities.registry import source_segments
from openm6.ops.sequence import visible
from tests.sequences import meta_of
from tests.small_model import modalities


def adapter(width: int = 16, size: int = 8) -> PoolAdapter:
    torch.manual_seed(0)
    return PoolAdapter(width, PoolConfig(size=size))


def arrays(keys: list[str], space: str = "a") -> dict[str, torch.Tensor]:
    """What a batch of pairs with these keys holds: each key once a side."""
    segments = [pooled([], key, space, learn=True)[0] for key in keys for _ in range(2)]
    return {
        name: torch.from_numpy(np.concatenate([segment.arrays[name] for segment in segments]))
        for name in ("key", "space")
    }


def test_the_sides_of_a_pair_do_not_attend_to_each_other() -> None:
    text = modalities()["text"]
    left, right = (pooled([text.source(words)], "7", "s", learn=True) for words in ("seven", "draw the digit"))
    pair, alone = build_pair(left, right), build_sequence(right)
    seen = visible(*[meta_of(pair)] * 2)[0, 0]
    half = sum(map(len, left))
    assert seen[:half, :half].all() and seen[half:, half:].all()
    assert not seen[:half, half:].any() and not seen[half:, :half].any()
    assert (meta_of(pair).positions[0][half:] == meta_of(alone).positions[0]).all()
    assert (meta_of(pair).attn_order[0] == 0).all()


def test_the_loss_is_the_mean_of_both_directions() -> None:
    pool, hidden = adapter(), torch.randn(6, 16)
    nll = pool.nll(hidden, arrays(["a", "b", "c"]))
    sides = pool.vectors(hidden).unflatten(0, (3, 2))
    scores = pool.scale * sides[:, 0] @ sides[:, 1].t()
    assert nll[::2].tolist() == pytest.approx((-scores.log_softmax(1).diagonal()).tolist(), rel=1e-5)
    assert nll[1::2].tolist() == pytest.approx((-scores.log_softmax(0).diagonal()).tolist(), rel=1e-5)


def test_equal_keys_and_other_spaces_do_not_compete() -> None:
    pool, hidden = adapter(), torch.randn(4, 16)
    assert pool.nll(hidden, arrays(["a", "a"])).abs().max() < 1e-6
    apart = {name: torch.cat([arrays(["a"], "x")[name], arrays(["b"], "y")[name]]) for name in ("key", "space")}
    assert pool.nll(hidden, apart).abs().max() < 1e-6
    assert pool.nll(hidden, arrays(["a", "b"])).max() > 1e-3


def test_no_pairs_cost_nothing_and_still_have_a_gradient() -> None:
    pool = adapter()
    pool.none().backward()
    assert pool.project.weight.grad is not None and not pool.project.weight.grad.any()


def test_a_hidden_layer_separates_what_one_projection_cannot() -> None:
    """Embeddings of x, −x and 0, of which a linear head makes two opposite ones."""
    hidden = torch.tensor([[1.0] * 16, [-1.0] * 16])
    torch.manual_seed(0)
    pool = PoolAdapter(16, PoolConfig(size=8, hidden_size=64))
    similarity = [float(one.vectors(hidden).detach().prod(0).sum()) for one in (adapter(), pool)]
    assert similarity[0] == pytest.approx(-1, abs=1e-5) and similarity[1] > -0.9
    pool.nll(torch.randn(4, 16), arrays(["a", "b"])).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in (pool.hidden.weight, pool.project.weight))  # type: ignore[union-attr]


def test_vectors_have_length_one_and_the_scale_a_bound() -> None:
    pool = adapter()
    assert torch.allclose(pool.vectors(torch.randn(5, 16)).norm(dim=-1), torch.ones(5))
    with torch.no_grad():
        pool.log_scale.fill_(50.0)
    assert pool.scale.item() == MAX_SCALE


def test_the_pool_token_attends_to_all_parts() -> None:
    segments = source_segments([Part("text", "draw"), Part("text", "seven")], modalities("block"))
    order = meta_of(build_sequence(pooled(segments))).attn_order[0]
    assert order[-1] > order[-2] > order[0], "and no part attends to what pools it"
    assert pooled([])[0].placement == "source"


def test_a_segment_is_one_token_of_its_own_kind() -> None:
    (segment,), (same,), (other,) = (
        pooled([], "seven", "text image"),
        pooled([], "seven"),
        pooled([], "eight"),
    )
    assert segment.kind == POOL and len(segment) == 1 and segment.span == 1 and not segment.learn.any()
    assert same.arrays["key"] == segment.arrays["key"] >= 0 and other.arrays["key"] != segment.arrays["key"]
