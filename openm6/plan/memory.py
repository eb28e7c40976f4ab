"""The memory model of plans and of a run's budget: bytes of each parameter and each token, on the device and the host.

It does without torch: a plan has sizes alone, and a run's budget (train/budget.py) adds its own records of weights.
"""

# Shapes: D width, Q query width H·d, G key-value width, P first product, F hidden, E experts, K choices, T tokens

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig, matrices_of

CONTEXT = 2.0 * 2**30  # bytes of a GPU that the driver, the libraries and the allocator's gaps take
HALF, FULL = 2, 4  # bytes of an element in bf16 and in fp32
ROW_ELEMENTS = 10.0  # of each row of an expert: its index, gate and position
FRAGMENTATION = 1.25  # what the allocator's gaps and the buffers of products add to activations
USED_FRACTION = 0.8  # of the free memory, by a batch that is chosen to fit: heads and adapters need some too
MIN_TOKENS = 128  # tokens of a micro-batch
BUFFERS = 2  # for offloaded layers
WORKING_FRACTION = 0.25  # of a device's memory that one micro-batch of one layer may take


def activation_elements(config: BackboneConfig, layer: int) -> float:
    """Elements that a layer keeps of one token for its backward pass; a test compares them with what torch keeps.

    Attention keeps 2D + 5Q + 2·2G, a dense network 2D and its products, a mixture of experts 2D, 2E of the router and,
    for each of K rows, 10 + 2D and its products. The products are 3F of swiglu (gate, up, hidden) and 2F of gelu.
    """
    part = config.feed_forward(layer)
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = 2 * config.hidden_size + 5 * query + 4 * key_value
    products = part.intermediate_size * matrices_of(part.hidden_act)
    if isinstance(part, DenseConfig):
        return attention + 2 * config.hidden_size + products
    row = ROW_ELEMENTS + 2 * config.hidden_size + products
    routed = part.experts_per_token * (part.capacity_factor or 1.0) * row + 2 * part.num_experts
    return attention + 2 * config.hidden_size + routed + part.num_shared * products


def max_activation_bytes(config: BackboneConfig, element: int) -> float:
    """Bytes that the layer with the most keeps of one token, at `element` bytes per element."""
    return element * max(activation_elements(config, layer) for layer in range(config.num_layers))


def layerwise_step(
    config: BackboneConfig, tokens: int, micro_batch: int, largest: float, element: int, every: int
) -> tuple[float, float, float]:
    """Bytes of a step that computes layers again one after the other: kept inputs, activations of one, its gradient.

    Inputs that exist at once: of each group of `every` layers the first's, and of the group at work all. The layers
    compute `micro_batch` of the `tokens` at a time; the `largest` has so many parameters.
    """
    inputs = -(-config.num_layers // every) + every - 1
    activations = micro_batch * max_activation_bytes(config, element)
    return float(element * tokens * config.hidden_size * inputs), activations, element * largest


def layers_to_recompute(config: BackboneConfig, tokens: int, element: int, free: float, stem: int = 0) -> int:
    """How many layers, from the first on, must keep their input alone so that all fits into `free` bytes.

    All of them if even that does not fit: the run then ends with the allocator's own sentence. `stem`: elements that
    are kept of each token before the first layer, as if all were patches of images.
    """
    size = FRAGMENTATION * tokens * element
    needed = [size * activation_elements(config, layer) for layer in range(config.num_layers)]
    # One layer at a time is computed again in the backward pass and needs its memory then.
    saved = [own - tokens * element * config.hidden_size for own in needed]
    excess, layers = sum(needed) + size * stem - free, 0
    while excess > 0 and layers < config.num_layers:
        excess -= saved[layers]
        layers += 1
    return layers if layers < 2 else min(config.num_layers, layers + math.ceil(needed[0] / saved[0]))


@dataclass(frozen=True)
class Tier:
    """Bytes of one parameter kept through a step; `layerwise`: gradients are used by layers, blocks computed again."""

    bytes: int
    weights: float
    gradients: float
    moments: float
    layerwise: bool
    description: str

    @property
    def kept(self) -> float:
        return self.weights + self.gradients + self.moments


TIERS: dict[int, Tier] = {
    tier.bytes: tier
    for tier in (
        Tier(16, 4, 4, 8, False, "fp32 weights, gradients and two moments of Adam"),
        Tier(12, 4, 4, 4, False, "fp32 weights and gradients, one momentum (Muon)"),
        Tier(8, 4, 4, 0, False, "fp32 weights and gradients, factored second moment (Adafactor)"),
        Tier(4, 2, 0, 2, True, "bf16 weights and momentum, stochastic rounding"),
        Tier(2, 2, 0, 0, True, "bf16 weights, stochastic rounding, factored second moment"),
        Tier(1, 1, 0, 0, True, "8-bit weights with block scales, stochastic rounding"),
    )
}
# Embeddings, heads, norms and routers, whatever the tier of layers that are trained one by one: fp32 under AdamW on
# each device, and a copy in the dtype of computation.
OTHERS = TIERS[16]
RESTING = OTHERS.kept + FULL
# Of such layers in fp32.
LAYERWISE_ADAM = replace(TIERS[16], gradients=0, layerwise=True)
BY_OPTIMIZER = {"adamw": 16, "muon": 12, "adafactor": 8}


def tokens_that_fit(
    config: BackboneConfig, parameters: float, tier: Tier, element: int, free: float, stem: int = 0
) -> int:
    """How many tokens a step may have that keeps all activations and takes USED_FRACTION of `free` bytes.

    `stem`: as of `layers_to_recompute`.
    """
    elements = stem + sum(activation_elements(config, layer) for layer in range(config.num_layers))
    left = USED_FRACTION * free - parameters * tier.kept
    return max(0, int(left / (FRAGMENTATION * element * elements)))


@dataclass(frozen=True)
class DeviceBudget:
    """Bytes on one device and, if they do not fit there, in the host memory beside it."""

    states: float
    activations: float
    working: float
    context: float
    host: float
    micro_batch: int  # tokens of one layer at a time

    @property
    def device(self) -> float:
        return self.states + self.activations + self.working + self.context


def device_budget(
    config: BackboneConfig, parameters: float, largest: float, tier: Tier, tokens: int, memory: float,
    learned_logits: float, activation_checkpointing_every: int = 1, resting: float = 0.0, record: float | None = None,
) -> DeviceBudget:  # fmt: skip
    """Of one of several equal devices: `parameters` and those of the `largest` layer that it holds, T tokens per step.

    resting: parameters that are on the device whatever happens, in fp32 under AdamW, if layers are trained one by one.
    record: those of the largest layer that are kept here, if others are gathered for each use.
    memory: usable bytes of the device. learned_logits: bytes of the output layer's results.
    activation_checkpointing_every: of so many layers the first's input alone is kept, if blocks are recomputed.
    """
    if not tier.layerwise:
        # Gradients are allocated as activations are freed: the larger of the two counts.
        elements = sum(activation_elements(config, layer) for layer in range(config.num_layers))
        kept = tokens * HALF * elements + learned_logits
        states = parameters * (tier.weights + tier.moments)
        return DeviceBudget(states, max(kept, parameters * tier.gradients), 0.0, CONTEXT, 0.0, tokens)
    states, micro = parameters * tier.kept, tokens
    while micro > MIN_TOKENS and micro * max_activation_bytes(config, HALF) > WORKING_FRACTION * memory:
        micro //= 2
    inputs, activations, gradient = layerwise_step(config, tokens, micro, largest, HALF, activation_checkpointing_every)
    # The layer's weights in the dtype of computation, unless they are stored in it.
    working = activations + gradient + (0.0 if tier.weights == HALF else HALF * largest)
    always = RESTING * resting
    left_over = memory - CONTEXT - inputs - learned_logits - working - always
    # Offloaded: all that is kept of a layer while it is trained, and of the next one in transfer.
    buffers = 0.0 if states <= left_over else BUFFERS * tier.kept * (largest if record is None else record)
    kept = max(0.0, min(states, left_over - buffers))
    return DeviceBudget(kept + always, inputs + learned_logits, working + buffers, CONTEXT, states - kept, micro)


def in_bytes(count: float) -> str:
    """Such as `12.3 GiB`."""
    units = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"))
    size, unit = next(((size, unit) for size, unit in units if count >= size), (1024, "KiB"))
    return f"{count / size:.3g} {unit}"
