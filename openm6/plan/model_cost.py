"""How many operations and weights one token meets, by part of the model; a pure function of the config."""

# Shapes: L layers, D width, F hidden, H·d attention width, E experts, K choices, V vocabulary, S keys of a token

from __future__ import annotations

from dataclasses import dataclass

from openm6.models.config import BackboneConfig, count_parameters
from openm6.nn.config import DenseConfig, ExpertsConfig, matrices_of

PASSES = 3  # products of each weight: forward, backward for the input's gradient, backward for the weight's


@dataclass(frozen=True)
class Weights:
    """Weights in the experts, and everywhere else."""

    experts: float
    others: float

    @property
    def total(self) -> float:
        return self.experts + self.others


def weights_per_token(config: BackboneConfig, vocabulary: int) -> Weights:
    """Weights that one token is multiplied with in a forward pass, the output layer included; no norms or look-ups."""
    experts, others = 0.0, float(vocabulary * config.hidden_size)
    attention = config.hidden_size * 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    for layer in range(config.num_layers):
        part = config.feed_forward(layer)
        network = matrices_of(part.hidden_act) * config.hidden_size * part.intermediate_size
        others += attention
        if isinstance(part, DenseConfig):
            others += network
        else:
            others += config.hidden_size * part.num_experts + part.num_shared * network
            # The padding up to the capacity is multiplied, too.
            experts += part.experts_per_token * network * (part.capacity_factor or 1.0)
    return Weights(experts, others)


def attention_operations(config: BackboneConfig, keys: float) -> float:
    """Scores and mixing of one token over `keys` keys in all layers, forward: 2 products of 2 S H·d."""
    return 4.0 * keys * config.num_heads * config.head_dim * config.num_layers


def operations_per_token(config: BackboneConfig, vocabulary: int, keys: float) -> float:
    """Operations of training on one token: 2 for each weight it meets, forward once and backward twice."""
    products = 2.0 * weights_per_token(config, vocabulary).total
    return PASSES * (products + attention_operations(config, keys))


def adapter_parameters(width: int) -> int:
    """Of images, audio and numbers together, with the shipped codecs: in and out of a backbone of this width."""
    return 4 * width**2 + 1937 * width + 520_880


def stored_parameters(config: BackboneConfig, vocabulary: int, adapters: bool = False) -> Weights:
    """Backbone and embedding, which is the output layer as well; with `adapters`, those of the other modalities."""
    experts = 0
    for layer, first in enumerate(config.shared_with):
        part = config.feed_forward(layer)
        if isinstance(part, ExpertsConfig) and first == layer:
            network = matrices_of(part.hidden_act) * config.hidden_size * part.intermediate_size
            experts += part.num_experts * network
    total = count_parameters(config).total + vocabulary * config.hidden_size
    total += adapter_parameters(config.hidden_size) if adapters else 0
    return Weights(experts, total - experts)


def max_layer_parameters(config: BackboneConfig) -> int:
    """Parameters of the largest layer, which is what offloaded training holds on the device at once."""
    alone = {"num_layers": 1, "sharing": None, "dense_layers": (), "moe_layer_freq": 1}
    return count_parameters(config.model_copy(update=alone)).total
