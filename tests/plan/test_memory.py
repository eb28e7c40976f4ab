"""Bytes of parameters by hand; bytes of activations by hand and against what torch keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openm6.modalities.batch import Batch
from openm6.models.backbone import Backbone, choose_mask
from openm6.models.config import BackboneConfig
from openm6.nn.block import Context, TransformerBlock
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.nn.moe import TokenDispatcher
from openm6.ops.matmul import bf16_matmul
from openm6.ops.pointwise import rotary_table
from openm6.ops.sequence import SequenceMeta
from openm6.plan.memory import (
    BY_OPTIMIZER,
    CONTEXT,
    FRAGMENTATION,
    TIERS,
    activation_elements,
    device_budget,
    layers_to_recompute,
    layerwise_step,
    max_activation_bytes,
)

CONFIG = BackboneConfig(
    hidden_size=64,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    dense=DenseConfig(intermediate_size=256, hidden_act="gelu"),
)
LAYER = 2 * 64 + 5 * 64 + 4 * 32 + 2 * 64 + 2 * 256  # elements
GIB = 2**30


def test_a_tier_is_called_by_the_bytes_that_it_keeps() -> None:
    assert all(tier.kept == size for size, tier in TIERS.items())
    assert set(BY_OPTIMIZER.values()) <= set(TIERS)


def test_sixteen_bytes_hold_weights_moments_and_the_larger_of_activations_and_gradients() -> None:
    budget = device_budget(CONFIG, 1e9, 1e8, TIERS[16], 1000, 80 * GIB, learned_logits=0.0)
    assert (budget.states, budget.activations, budget.context) == (12e9, 4e9, CONTEXT)
    assert budget.host == 0 and budget.device == 16e9 + CONTEXT
    crowded = device_budget(CONFIG, 1e3, 1e3, TIERS[16], 1000, 80 * GIB, learned_logits=5.0)
    assert crowded.activations == 1000 * 2 * 3 * LAYER + 5.0


@pytest.mark.parametrize(("size", "states"), [(4, 4e9), (2, 2e9), (1, 1e9)])
def test_small_tiers_hold_no_gradients_but_a_layer_s(size: int, states: float) -> None:
    budget = device_budget(CONFIG, 1e9, 1e8, TIERS[size], 1024, 80 * GIB, learned_logits=0.0)
    assert budget.states == states and budget.host == 0
    assert budget.activations == 2 * 1024 * 64 * 3  # bf16 input of each block
    copy = 2 * 1e8 if size == 1 else 0  # bf16 weights are computed with as they are stored
    assert budget.working == 1024 * max_activation_bytes(CONFIG, 2) + 2 * 1e8 + copy


def test_what_does_not_fit_is_offloaded_and_nothing_is_lost() -> None:
    budget = device_budget(CONFIG, 40e9, 1e9, TIERS[2], 1024, 32 * GIB, learned_logits=0.0)
    assert budget.states + budget.host == 80e9
    assert budget.device == pytest.approx(32 * GIB)


@pytest.mark.parametrize("size", [4, 2, 1])
def test_two_layers_with_their_moments_pass_through_the_device(size: int) -> None:
    here, away = (
        device_budget(CONFIG, 40e9, 1e9, TIERS[size], 1024, memory * GIB, learned_logits=0.0, record=0.5e9)
        for memory in (800, 16)
    )
    assert away.working - here.working == 2 * 0.5e9 * size


def test_a_micro_batch_shrinks_until_a_layer_fits() -> None:
    budget = device_budget(CONFIG, 1e6, 1e5, TIERS[2], 1 << 20, 4 * GIB, learned_logits=0.0)
    row = max_activation_bytes(CONFIG, 2)
    assert budget.micro_batch * row <= GIB < 2 * budget.micro_batch * row


def test_elements_of_a_dense_layer_by_hand() -> None:
    assert activation_elements(CONFIG, 0) == LAYER and max_activation_bytes(CONFIG, 4) == 4 * LAYER


def test_of_a_group_the_first_input_is_kept_and_of_the_group_at_work_all() -> None:
    twelve = CONFIG.model_copy(update={"num_layers": 12})
    inputs = [layerwise_step(twelve, 1, 1, 0.0, 4, every)[0] for every in (1, 3, 5, 12)]
    assert inputs == [4 * 64 * layers for layers in (12, 4 + 2, 3 + 4, 1 + 11)]
    sizes = (1e9, 1e8, TIERS[2], 1024, 80 * GIB)
    each, third = (device_budget(CONFIG, *sizes, 0.0, every) for every in (1, 3))
    assert each.activations - third.activations == 0  # three layers: all of them are at work
    assert device_budget(twelve, *sizes, 0.0, 3).activations == 2 * 1024 * 64 * 6


def test_as_few_layers_are_computed_again_as_the_memory_asks_for() -> None:
    total = FRAGMENTATION * 100 * 2 * 3 * LAYER
    assert layers_to_recompute(CONFIG, 100, 2, total) == 0
    assert layers_to_recompute(CONFIG, 100, 2, total - 1) == layers_to_recompute(CONFIG, 100, 2, total, stem=1) == 1
    assert layers_to_recompute(CONFIG, 100, 2, 0.0) == 3
    numbers = [layers_to_recompute(CONFIG, 100, 2, total * tenths / 10) for tenths in range(11)]
    assert numbers == sorted(numbers, reverse=True)


ELEMENT = 4  # bytes: what lies between products stays in fp32 on a processor
ROWS, LENGTH, EXAMPLE = 8, 512, 64  # tokens of one example; with so many rows the padding is small
SIZES = {"hidden_size": 128, "num_layers": 1, "num_kv_heads": 1, "head_dim": 64}


def packed() -> Batch:
    """Rows of examples of 64 tokens, of which half are inputs and half a target with causal attention."""
    tokens = torch.arange(LENGTH, dtype=torch.int32).expand(ROWS, LENGTH)
    example = tokens // EXAMPLE
    order = (tokens % EXAMPLE - EXAMPLE // 2 + 1).clamp(min=0)
    positions = (tokens % EXAMPLE)[..., None].expand(-1, -1, 3)
    return Batch(SequenceMeta(example, order, torch.zeros_like(example), positions), {}, ROWS * LENGTH, [])


def block_of(config: BackboneConfig, batch: Batch) -> tuple[TransformerBlock, Context]:
    """The only layer of a backbone, and what its forward pass needs of a batch."""
    backbone, meta = Backbone(config), batch.meta
    x = torch.zeros(meta.batch, meta.length, config.hidden_size)
    context = Context(
        rotary=rotary_table(meta.positions, config.rope_theta, config.sections),
        mask=choose_mask(meta, None, x),
        valid=meta.valid,
        cache=None,
        dispatcher=TokenDispatcher(),
    )
    return backbone.blocks[0], context


def kept_elements(config: BackboneConfig) -> float:
    """Elements that one layer keeps of a token between its forward and its backward pass, weights left out."""
    block, context = block_of(config, packed())
    own = {weight.untyped_storage().data_ptr() for weight in block.parameters()}
    own |= {table.untyped_storage().data_ptr() for table in context.rotary}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            held[pointer] = tensor  # alive, so that no other tensor gets its memory
        return tensor

    x = torch.randn(ROWS, LENGTH, config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x * 1.0, context, 0)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()) / ELEMENT / (ROWS * LENGTH)


CONFIGS = pytest.mark.parametrize(
    "config",
    [
        BackboneConfig(**SIZES, num_heads=2, dense=DenseConfig(intermediate_size=256)),
        BackboneConfig(**SIZES, num_heads=4, dense=DenseConfig(intermediate_size=384, hidden_act="gelu")),
        BackboneConfig(**SIZES, num_heads=2, experts=ExpertsConfig(intermediate_size=256, num_experts=8, top_k=2)),
        BackboneConfig(
            **SIZES,
            num_heads=2,
            experts=ExpertsConfig(intermediate_size=128, num_experts=16, num_prototypes=4, hidden_act="gelu"),
        ),
    ],
    ids=["swiglu", "gelu", "top-k", "prototypes"],
)


@CONFIGS
def test_elements_are_what_torch_keeps(config: BackboneConfig) -> None:
    """In bf16 a little less: what lies between products stays in fp32, so the estimate is an upper bound."""
    kept = activation_elements(config, 0)
    experts = config.experts
    if experts is not None and experts.hidden_act == "swiglu":
        # On a CPU experts run one after the other, and keep less of each row.
        kept -= experts.experts_per_token * (config.hidden_size + experts.intermediate_size)
    assert kept == pytest.approx(kept_elements(config), rel=0.05)
    with bf16_matmul():
        assert 5 / 6 * kept <= kept_elements(config) <= kept
