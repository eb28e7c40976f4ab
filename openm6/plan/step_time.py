"""Seconds of one training step on a cluster of GPUs, by what takes them; and the bottleneck."""

# Shapes: n devices, g of them in a node, T tokens a step of one device, K choices, D width

from __future__ import annotations

from dataclasses import dataclass

from openm6.models.config import BackboneConfig
from openm6.nn.config import ExpertsConfig
from openm6.plan.hardware import Cluster
from openm6.plan.memory import DeviceBudget, Tier
from openm6.plan.model_cost import ParameterCounts, attention_operations, weights_per_token

READS = 3  # of every weight in a step: forward, backward for inputs, backward for weights (or computed again)


@dataclass(frozen=True)
class StepTime:
    """Seconds a step spends on each concern. Streaming from the host hides behind all else, or the reverse."""

    compute: float
    memory: float
    link: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.compute + self.memory + self.network, self.link)

    @property
    def bottleneck(self) -> str:
        """What most of the time is spent on."""
        if self.link >= self.compute + self.memory + self.network:
            return "link"
        parts = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(parts, key=lambda name: parts[name])

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of the time in which a device computes, moves its memory, and waits."""
        seconds = self.seconds
        computing, moving = self.compute / seconds, self.memory / seconds
        return computing, moving, max(0.0, 1.0 - computing - moving)


def step_time(
    config: BackboneConfig,
    vocabulary: int,
    stored: ParameterCounts,
    tier: Tier,
    budget: DeviceBudget,
    tokens: int,
    keys: float,
    cluster: Cluster,
    activation_checkpointing_every: int = 1,
) -> StepTime:
    """One step of T tokens a device, of which each sees `keys` keys."""
    passes = forward_passes(activation_checkpointing_every) + 2.0 if tier.layerwise else 3.0
    weights = weights_per_token(config, vocabulary)
    dense = passes * (2.0 * (weights.all - weights.experts) + attention_operations(config, keys)) * tokens
    experts = passes * 2.0 * weights.experts * tokens
    compute = dense / cluster.dense_rate + experts / cluster.expert_rate
    # Each device reads its share of the experts and all other weights; then every state is read and written once.
    share = stored.experts / cluster.devices + stored.others
    moved = share * tier.weights * (READS + (1 if tier.layerwise else 0))
    moved += 2.0 * stored.total / cluster.devices * tier.kept
    # For the forward and for the backward pass, and once more where a group's inputs are computed again; written back
    # beside the last.
    into_device = budget.host * (2 if activation_checkpointing_every == 1 else 3)
    network = all_to_all(config, tokens, passes, cluster) + reduction(stored, cluster)
    return StepTime(compute, moved / cluster.memory_rate, into_device / cluster.host_link, network)


def forward_passes(activation_checkpointing_every: int) -> float:
    """How often a block runs forward where only the input of each so many is kept: once, again for its own backward
    pass, and for the input of the next of its group.
    """
    return 2.0 + (activation_checkpointing_every - 1) / activation_checkpointing_every


def all_to_all(config: BackboneConfig, tokens: int, passes: float, cluster: Cluster) -> float:
    """Seconds of carrying rows to their experts and answers back, in bf16; a gradient takes the same way back.

    A row goes to any device with the same chance: (g-1)/n stay in the node, (n-g)/n leave it.
    """
    rows = 0.0
    for layer in range(config.num_layers):
        part = config.feed_forward(layer)
        rows += part.experts_per_token if isinstance(part, ExpertsConfig) else 0
    exchanges = 2 * (
        passes - 1
    )  # there and back: forward, backward, and once more where blocks are computed again
    moved = tokens * rows * config.hidden_size * 2.0 * exchanges
    n, g = cluster.devices, cluster.per_node
    inside, outside = moved * (min(g, n) - 1) / n, moved * max(0, n - g) / n
    return max(inside / cluster.peer_link, outside / cluster.network)


def reduction(stored: ParameterCounts, cluster: Cluster) -> float:
    """Seconds of summing the gradients of what every device holds, in bf16, first within nodes, then between them."""
    if cluster.devices == 1:
        return 0.0
    gradient = 2.0 * stored.others
    inside = 2.0 * gradient / cluster.peer_link
    return inside + (2.0 * gradient / cluster.per_node / cluster.network if cluster.nodes > 1 else 0.0)
