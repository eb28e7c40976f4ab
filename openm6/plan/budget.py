"""The byte budget: what each parameter and each token takes, and where it lies."""

# Letters: T tokens a step of one device, D width, F hidden, E experts, K choices, V vocabulary

from __future__ import annotations

from dataclasses import dataclass

from openm6.models.config import BackboneConfig
from openm6.plan.activations import Activations

CONTEXT = 2.0 * 2**30  # bytes of a GPU that the driver, the libraries and the allocator's gaps take
HALF = 2  # bytes of an element in bf16
FEWEST = 128  # tokens of a micro-batch
WORKING_SHARE = 0.25  # part of a device's memory that one micro-batch of one layer may take


@dataclass(frozen=True)
class Tier:
    """Bytes of one parameter. `layerwise`: gradients are consumed layer by layer, and blocks are computed again.

    weights, gradients and moments are what is kept from step to step or through a whole step.
    """

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
BY_OPTIMIZER = {"adamw": 16, "muon": 12, "adafactor": 8}


@dataclass(frozen=True)
class DeviceBudget:
    """Bytes on one device and, for what does not fit there, in the host's memory beside it."""

    states: float
    activations: float
    working: float
    context: float
    host: float
    micro_batch: int  # tokens of one layer at a time

    @property
    def device(self) -> float:
        return self.states + self.activations + self.working + self.context

    @property
    def streamed(self) -> bool:
        return self.host > 0


def device_budget(
    config: BackboneConfig,
    parameters: float,
    largest: float,
    tier: Tier,
    tokens: int,
    memory: float,
    learned_logits: float,
    recompute_every: int = 1,
) -> DeviceBudget:
    """Of one of several equal devices: its share of `parameters`, its share of the `largest` layer, T tokens a step.

    memory: usable bytes of the device. learned_logits: bytes of the output layer's results. recompute_every: of so many
    layers the first's input alone is kept, where blocks are computed again.
    """
    activations = Activations()
    if not tier.layerwise:
        # Gradients come as activations go: the larger of the two counts.
        kept = tokens * activations.bytes_a_token(config, HALF) + learned_logits
        states = parameters * (tier.weights + tier.moments)
        return DeviceBudget(states, max(kept, parameters * tier.gradients), 0.0, CONTEXT, 0.0, tokens)
    states = parameters * tier.kept
    inputs = float(HALF) * tokens * config.width * kept_inputs(config.num_layers, recompute_every)
    micro, row = tokens, activations.largest_layer(config, HALF)
    while micro > FEWEST and micro * row > WORKING_SHARE * memory:
        micro //= 2
    working, gradient = micro * row, float(HALF) * largest
    room = memory - CONTEXT - inputs - working - learned_logits - gradient
    if states <= room:
        return DeviceBudget(states, inputs + learned_logits, working + gradient, CONTEXT, 0.0, micro)
    # Streamed: a layer's weights while it is trained, and the next one on its way.
    buffers = largest * (HALF + tier.weights)
    kept = max(0.0, min(states, room - buffers))
    working += gradient + buffers
    return DeviceBudget(kept, inputs + learned_logits, working, CONTEXT, states - kept, micro)


def kept_inputs(layers: int, recompute_every: int) -> int:
    """Inputs of blocks that exist at once: of each group the first's, and of the group at work all."""
    return -(-layers // recompute_every) + recompute_every - 1
