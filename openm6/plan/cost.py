"""Seconds of one part of a training step as a sum: so much for each unit of each cause, as it was measured here."""

# Letters: T tokens, D width, F hidden, m matrices of a network, E experts, K choices, V vocabulary, n tokens of a kind

from __future__ import annotations

from collections.abc import Mapping

from openm6.base.config import Config
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig, ExpertsConfig, matrices_of
from openm6.plan.activations import Activations

Causes = Mapping[str, float]


class Cost(Config):
    """The price of each cause, in seconds a unit; none is below zero, so larger parts never take less."""

    prices: dict[str, float]

    def seconds(self, causes: Causes) -> float:
        """Of a part with these causes; those without a price are free."""
        return sum(self.prices.get(name, 0.0) * count for name, count in causes.items())


def attention_causes(config: BackboneConfig, tokens: float, pairs: float, pieces: float) -> Causes:
    """One layer, forward and backward. pairs: of a query and a key that are multiplied; pieces: runs of queries that
    are multiplied with their keys at once, for each key head.
    """
    return {
        "calls": 1.0,
        "products": tokens * projection(config),
        "elements": tokens * Activations().attention_elements(config),
        "pairs": pairs * config.num_heads * config.head_dim,
        "pieces": pieces * config.num_kv_heads,
    }


def network_causes(width: int, part: DenseConfig | ExpertsConfig, tokens: float) -> Causes:
    """One feed-forward part, forward and backward: one network for all tokens, or experts for K of them each."""
    matrices = matrices_of(part.ffn)
    network, hidden = matrices * width * part.hidden, matrices * part.hidden
    if isinstance(part, DenseConfig):
        elements = tokens * (2 * width + hidden)
        return {"calls": 1.0, "products": tokens * network, "elements": elements, "weights": float(network)}
    rows = tokens * part.choices * (part.capacity or 1.0)
    return {
        "calls": 1.0,
        "experts": float(part.num_experts),
        "products": rows * network + tokens * part.num_shared * network,
        "elements": tokens * 2 * width + rows * (10 + 2 * width + hidden),
        "weights": float(network * (part.num_experts + part.num_shared)),
    }


def head_causes(width: int, vocabulary: int, learned: float) -> Causes:
    """The output layer over n words that are wanted, with its loss."""
    return {
        "calls": 1.0,
        "products": learned * vocabulary * width,
        "elements": learned * vocabulary,
        "weights": float(vocabulary * width),
    }


def adapter_causes(width: int, tokens: float) -> Causes:
    """An adapter over n tokens of its kind, in or out."""
    return {"calls": 1.0, "tokens": tokens, "products": tokens * width, "weights": float(width)}


def update_causes(parameters: float) -> Causes:
    """Sum of gradients, their norm and the optimizer's step."""
    return {"calls": 1.0, "parameters": parameters}


def projection(config: BackboneConfig) -> int:
    """Weights of one layer's attention."""
    return config.width * 2 * (config.num_heads + config.num_kv_heads) * config.head_dim


def network_part(part: DenseConfig | ExpertsConfig) -> str:
    """The name under which the cost of a feed-forward part is kept."""
    return "dense" if isinstance(part, DenseConfig) else "experts"
