"""How much memory a layer keeps for its backward pass, and how many layers must make it again to fit; without torch."""

# Letters: D width, H query heads, G key-value heads, d size of a head, F hidden, P first product, K choices per token

from __future__ import annotations

import math

from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig

MARGIN = 1.3  # small tensors, fragments, and the buffers of products


def layer_bytes(config: BackboneConfig, layer: int, tokens: int, bytes_each: int) -> float:
    """Bytes that one layer keeps from its forward to its backward pass, with a margin.

    A token: the stream before each part and two norms (4D), queries, keys, values and the answer ((2H + 2G)·d), and of
    the feed-forward part its K rows, products and hidden values (K·(D + P + F)).
    """
    part = config.feed_forward(layer)
    products = 2 if part.ffn == "swiglu" else 1
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    if isinstance(part, DenseConfig):
        inner = (products + 1) * part.hidden
    else:
        always = part.num_shared * (products + 1) * part.hidden
        inner = always + part.choices * (config.width + (products + 1) * part.hidden)
    return MARGIN * tokens * bytes_each * (4 * config.width + attention + inner)


def layers_to_recompute(config: BackboneConfig, tokens: int, bytes_each: int, free: float) -> int:
    """How many layers, from the first on, must keep their input alone so that all fits into `free` bytes.

    All of them where even that does not fit: the run then ends with the allocator's own sentence.
    """
    needed = [layer_bytes(config, layer, tokens, bytes_each) for layer in range(config.num_layers)]
    inputs = tokens * bytes_each * config.width
    excess = sum(needed) - free
    # One layer at a time is made again in the backward pass and needs its room then.
    saved = [own - inputs for own in needed]
    number = 0
    while excess > 0 and number < config.num_layers:
        excess -= saved[number]
        number += 1
    return number if number < 2 else min(config.num_layers, number + math.ceil(needed[0] / saved[0]))
