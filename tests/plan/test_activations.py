"""The planner's elements against what torch really keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openm6.modalities.batch import Batch
from openm6.models.backbone import Backbone, choose_mask
from openm6.models.config import BackboneConfig
from openm6.nn.block import Block, Context, LayerParts
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.nn.exchange import LocalExchange
from openm6.ops.precision import products_in_half
from openm6.ops.rotary import rotary_table
from openm6.ops.sequence import SequenceMeta
from openm6.plan.activations import Activations

ELEMENT = 4  # bytes: what lies between products stays in fp32 on a processor
ROWS, LENGTH, PIECE = 8, 512, 64  # and the tokens of one example; so many rows that filling them up is little
SIZES = {"width": 128, "num_layers": 1, "num_kv_heads": 1, "head_dim": 64}


def packed() -> Batch:
    """Rows of examples of 64 tokens, half of each read and half wanted one after the other."""
    places = torch.arange(LENGTH).expand(ROWS, LENGTH)
    sample = (places // PIECE).to(torch.int32)
    order = (places % PIECE - PIECE // 2 + 1).clamp(min=0).to(torch.int32)
    positions = (places % PIECE).to(torch.int32)[..., None].expand(-1, -1, 3)
    return Batch(SequenceMeta(sample, order, torch.zeros_like(sample), positions), {}, ROWS * LENGTH, [])


def block_of(config: BackboneConfig, batch: Batch) -> tuple[Block, LayerParts, Context]:
    """The only layer of a backbone, and what its forward pass needs of a batch."""
    backbone, layout = Backbone(config), batch.layout
    x = torch.zeros(layout.batch, layout.length, config.width)
    context = Context(
        rotary=rotary_table(layout.positions, config.rope_theta, config.sections),
        mask=choose_mask(layout, None, x),
        valid=layout.valid,
        cache=None,
        exchange=LocalExchange(),
    )
    block, parts = backbone.sets[0], backbone.layers[0]
    assert isinstance(block, Block) and isinstance(parts, LayerParts)
    return block, parts, context


def kept_elements(config: BackboneConfig) -> float:
    """Elements that one layer keeps of a token between its forward and its backward pass, weights left out."""
    block, parts, context = block_of(config, packed())
    own = {weight.untyped_storage().data_ptr() for weight in [*block.parameters(), *parts.parameters()]}
    own |= {table.untyped_storage().data_ptr() for table in context.rotary}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            held[pointer] = tensor  # alive, so that no other tensor gets its place
        return tensor

    x = torch.randn(ROWS, LENGTH, config.width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x * 1.0, parts, context, 0)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()) / ELEMENT / (ROWS * LENGTH)


CONFIGS = pytest.mark.parametrize(
    "config",
    [
        BackboneConfig(**SIZES, num_heads=2, dense=DenseConfig(hidden=256)),
        BackboneConfig(**SIZES, num_heads=4, dense=DenseConfig(hidden=384, ffn="gelu")),
        BackboneConfig(**SIZES, num_heads=2, experts=ExpertsConfig(hidden=256, num_experts=8, top_k=2)),
        BackboneConfig(
            **SIZES,
            num_heads=2,
            experts=ExpertsConfig(hidden=128, num_experts=16, num_prototypes=4, ffn="gelu"),
        ),
    ],
    ids=["swiglu", "gelu", "top-k", "prototypes"],
)


@CONFIGS
def test_elements_are_what_torch_keeps(config: BackboneConfig) -> None:
    kept = Activations(by_expert=True).bytes_a_token(config, 1)
    assert kept == pytest.approx(kept_elements(config), rel=0.05)


@CONFIGS
def test_products_in_bf16_keep_a_little_less(config: BackboneConfig) -> None:
    """What lies between products stays in fp32, so the estimate holds for either precision, as an upper bound."""
    kept = Activations(by_expert=True).bytes_a_token(config, 1)
    with products_in_half():
        assert 5 / 6 * kept <= kept_elements(config) <= kept
