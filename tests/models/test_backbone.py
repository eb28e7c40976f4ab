"""The backbone's promises: packed = alone, cached = uncached, shared = summed, built on meta = built here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from openm6.checkpoint.save import named_tensors
from openm6.models.backbone import Backbone, choose_mask, side_loss
from openm6.models.config import BackboneConfig, count_parameters
from openm6.nn.cache import SlotReader, SlotWriter
from openm6.nn.moe import RouterStats
from openm6.ops.sequence import SequenceMeta, causal_meta, join, visible
from tests.sequences import narrow, padding_meta

SIZE: dict[str, Any] = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
DENSE = {"intermediate_size": 48}
EXPERTS = {"intermediate_size": 24, "num_experts": 4, "top_k": 2}
PROTOTYPES = {
    "intermediate_size": 24,
    "num_experts": 4,
    "num_prototypes": 2,
    "hidden_act": "gelu",
    "num_shared": 1,
}

CONFIGS = {
    "dense": {"dense": DENSE},
    "experts": {"experts": EXPERTS},
    "every other": {
        "experts": PROTOTYPES,
        "dense": {"intermediate_size": 40, "hidden_act": "gelu"},
        "moe_layer_freq": 2,
    },
    "first dense": {"experts": EXPERTS, "dense": DENSE, "dense_layers": (0,)},
    "shared": {"experts": EXPERTS, "sharing": "all"},
    "shared routers": {"experts": EXPERTS, "sharing": (0, 0, 1, 1), "share_routers": True},
    "shared kinds": {"experts": EXPERTS, "dense": DENSE, "moe_layer_freq": 2, "sharing": "all"},
    "plain heads": {"dense": DENSE, "qk_norm": False, "rope_sections": (8, 0, 0)},
}


def make(name: str, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(BackboneConfig(**SIZE, **CONFIGS[name], initializer_range=0.2))


def example(sample: int, seed: int) -> SequenceMeta:
    """A source of 5 tokens with positions in the plane, 3 words, and a private image of 4 codes."""
    order = torch.tensor([[0] * 5 + [1, 2, 3] + [4] * 4], dtype=torch.int32)
    private = torch.tensor([[0] * 8 + [1] * 4], dtype=torch.int32)
    positions = torch.randint(0, 9, (1, 12, 3), generator=torch.Generator().manual_seed(seed))
    return SequenceMeta(torch.full_like(order, sample), order, private, positions)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_examples_answer_as_alone(name):
    model = make(name)
    metas = [example(0, 1), example(1, 2), padding_meta(1, 3), example(2, 3)]
    x = torch.randn(1, 39, 32)
    packed, _ = model(x, join(metas))
    for start, meta in ((0, metas[0]), (12, metas[1]), (27, metas[3])):
        alone, _ = model(x[:, start : start + 12], meta)
        torch.testing.assert_close(packed[:, start : start + 12], alone, rtol=1e-4, atol=1e-5)
    assert packed.isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_steps_equal_one_pass(name):
    model, x, meta = make(name).eval(), torch.randn(2, 20, 32), causal_meta(2, 20)
    with torch.no_grad():
        whole, _ = model(x, meta)
        cache = model.new_cache(3, 20)
        for row, slot in ((0, 2), (1, 0)):
            parts = [
                model(
                    x[row : row + 1, start:stop],
                    narrow(causal_meta(1, 20), start, stop),
                    SlotWriter(cache, slot, start),
                )[0]
                for start, stop in ((0, 9), (9, 10), (10, 11), (11, 20))
            ]
            torch.testing.assert_close(torch.cat(parts, dim=1)[0], whole[row], rtol=1e-4, atol=1e-5)
    assert cache.lengths == [20, 0, 20]


def test_a_masked_parallel_target_leaves_no_trace():
    """Two private images after the same cached prompt: the second must not see the first."""
    model, meta = make("experts"), example(0, 4)
    x, other = torch.randn(1, 12, 32), torch.randn(1, 4, 32)
    with torch.no_grad():
        cache = model.new_cache(1, 8)
        model(x[:, :8], narrow(meta, 0, 8), SlotWriter(cache, 0))
        for target in (other, x[:, 8:]):
            output, _ = model(target, narrow(meta, 8, 12), SlotReader(cache, [0]))
        torch.testing.assert_close(output, model(x, meta)[0][:, 8:], rtol=1e-4, atol=1e-5)


def test_later_tokens_do_not_see_a_private_image():
    model, meta = make("dense"), example(0, 5)
    after = SequenceMeta(*(part[:, :1] for part in meta.parts()))
    after = SequenceMeta(after.example_id, after.attn_order + 9, after.block_id, after.positions)
    x = torch.randn(1, 13, 32, requires_grad=True)
    hidden, _ = model(x, join([meta, after]))
    hidden[0, 12].square().sum().backward()
    assert x.grad is not None
    assert not x.grad[0, 8:12].any()
    assert x.grad[0, :8].abs().sum(-1).min() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns_and_is_counted(name):
    model = make(name)
    hidden, loads = model(torch.randn(2, 24, 32), causal_meta(2, 24))
    (hidden.square().mean() * 3 + hidden.sum() + side_loss(loads)).backward()
    lazy = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert lazy == []
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())
    assert [load.layer for load in loads] == [i for i in range(4) if model.config.has_experts(i)]


def test_active_parameters_follow_the_choices():
    config = make("every other").config
    network = 2 * 32 * 24
    idle = 2 * (4 - 2) * network  # two sparse layers leave two of four experts idle
    assert count_parameters(config).active == count_parameters(config).total - idle
    shared = make("shared").config
    assert count_parameters(shared).active == count_parameters(make("experts").config).active


def test_copies_of_shared_weights_answer_as_they_do():
    shared = make("shared")
    plain = Backbone(BackboneConfig(**SIZE, **CONFIGS["experts"]))
    plain.load_state_dict(shared.state_dict())  # which holds shared weights under the name of each layer
    x, meta = torch.randn(1, 9, 32), causal_meta(1, 9)
    assert torch.equal(shared(x, meta)[0], plain(x, meta)[0])


def test_layers_of_a_group_hold_the_same_modules_and_are_stored_once():
    model = make("shared routers")  # layers 0 and 1, 2 and 3
    blocks = model.blocks
    assert blocks[2].attention is blocks[3].attention and blocks[2].mlp.experts is blocks[3].mlp.experts
    assert blocks[2].router is blocks[3].router and blocks[1].attention is not blocks[2].attention
    assert blocks[2].mlp_norm is not blocks[3].mlp_norm
    stored = named_tensors(model)
    assert {name for name in stored if name.startswith("layers.2.")} == {
        f"layers.2.{name}"
        for name in (
            "attention_norm.weight", "qk_norm.query", "qk_norm.key", "attention.qkv", "attention.output",
            "mlp_norm.weight", "mlp.router.weight", "mlp.router.bias", "mlp.experts.up", "mlp.experts.down",
        )
    }  # fmt: skip
    own = {name for name in stored if name.startswith("layers.3.")}
    assert own == {
        f"layers.3.{name}" for name in ("attention_norm.weight", "qk_norm.query", "qk_norm.key", "mlp_norm.weight")
    }
    first, second, *_ = make("shared").blocks
    assert first.mlp.experts is second.mlp.experts and first.router is not second.router


def test_delinked_layers_have_modules_of_their_own():
    model = make("shared routers")
    first = model.blocks[2].attention.qkv
    names = model.delink()
    assert names["layers.3.mlp.router.weight"] == names["layers.2.mlp.router.weight"] == "layers.2.mlp.router.weight"
    assert model.blocks[2].attention.qkv is first and model.blocks[3].attention.qkv is not first
    assert torch.equal(model.blocks[3].attention.qkv, first)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


def test_meta_build_fills_as_a_direct_one():
    direct = make("first dense", seed=3)
    with torch.device("meta"):
        model = Backbone(direct.config)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.reset_parameters()
    for (name, ours), theirs in zip(model.state_dict().items(), direct.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_first_weights_have_the_stated_spread():
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(**{**SIZE, "hidden_size": 128}, experts={**EXPERTS, "intermediate_size": 128}))
    block = model.blocks[0]
    assert block.mlp.experts.up.std().item() == pytest.approx(0.64 / 128**0.5, rel=0.05)
    assert block.attention.output.std().item() == pytest.approx(0.64 / 128**0.5 / 8**0.5, rel=0.05)


def report(layer: int, load: list[float]) -> RouterStats:
    zero = torch.zeros(())
    return RouterStats(layer, torch.tensor(load), zero, zero)


def biases(model: Backbone) -> list[Tensor]:
    routers = [block.router for block in model.blocks]
    return [router.bias for router in routers if router is not None and router.bias is not None]


def test_balance_sums_reports_of_a_router():
    model = make("experts")
    model.update_balance([report(1, [3.0, 0, 0, 1]), report(1, [0, 3.0, 1, 0])])
    rate = 0.01
    torch.testing.assert_close(biases(model)[1], torch.tensor([-rate, -rate, rate, rate]))
    assert not biases(model)[0].any()


def test_a_shared_router_moves_once_by_the_sum_of_its_layers():
    model = make("shared routers")
    model.update_balance([report(0, [8.0, 0, 0, 0]), report(1, [0, 8.0, 8, 8])])
    assert not biases(model)[0].any(), "the two layers balance each other"
    model.update_balance([report(2, [8.0, 0, 0, 0])])
    assert biases(model)[2] is biases(model)[3]
    assert biases(model)[2].tolist() == pytest.approx([-0.01, 0.01, 0.01, 0.01])


def test_autocast_runs_forward_and_backward():
    model = make("experts")
    x, meta = torch.randn(2, 10, 32), causal_meta(2, 10)
    plain, _ = model(x, meta)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, loads = model(x, meta)
        (hidden.float().square().mean() + side_loss(loads)).backward()
        with torch.no_grad():
            cached, _ = model(x[:1], causal_meta(1, 10), SlotWriter(model.new_cache(1, 10), 0))
    assert (hidden.float() - plain).abs().mean() < 0.05
    torch.testing.assert_close(cached.float(), hidden[:1].float(), rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_weights():
    model, meta = make("experts"), causal_meta(1, 10)
    x = torch.randn(1, 10, 32)
    plain, _ = model(x, meta)
    half, _ = model.bfloat16()(x.bfloat16(), meta)
    assert half.dtype == torch.bfloat16
    assert (half.float() - plain).abs().mean() < 0.1


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected \(1, 9, 32\)"):
        make("dense")(torch.randn(1, 8, 32), causal_meta(1, 9))


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_without_kernels_takes_a_dense_mask(monkeypatch, works):
    """What is asked of an embedding on a GPU: its device and dtype."""
    monkeypatch.setattr("openm6.models.backbone.kernels.available", lambda device: works)
    device = torch.device("cuda", 0)
    x = SimpleNamespace(is_cpu=False, is_cuda=True, device=device, dtype=torch.float32)
    meta = join([causal_meta(1, 100), padding_meta(1, 21)])
    mask = choose_mask(meta, None, x)
    if works:
        assert isinstance(mask, BlockMask) and mask.seq_lengths == (128, 128)
    else:
        assert mask.dtype == torch.bool and torch.equal(mask, visible(meta, meta))
    # Rows of one causal example, as in benchmarks, take what training takes.
    assert isinstance(choose_mask(causal_meta(1, 100), None, x), BlockMask if works else Tensor)
    with torch.no_grad():  # lengths of evaluation are many, and its small masks cheap
        assert torch.equal(choose_mask(meta, None, x), visible(meta, meta))
        large = join([causal_meta(5, 1000), padding_meta(5, 24)])
        assert isinstance(choose_mask(large, None, x), BlockMask if works else Tensor)
