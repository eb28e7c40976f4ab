"""Seconds of one training step on a cluster of GPUs by concern, and the bottleneck."""

# Shapes: n devices, g of them in a node, T tokens per step of one device, K choices, D width

from __future__ import annotations

from dataclasses import dataclass

from openm6.models.config import BackboneConfig
from openm6.nn.config import ExpertsConfig
from openm6.plan.hardware import Cluster
from openm6.plan.memory import DeviceBudget, Tier
from openm6.plan.model_cost import Weights, attention_operations, weights_per_token

READS = 3  # of every weight in a step: forward, backward for inputs, backward for weights (or recomputation)


@dataclass(frozen=True)
class StepTime:
    """Seconds a step spends on each concern. Transfers from the host hide behind all else, or the reverse."""

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
        if self.link == self.seconds:
            return "link"
        return max(("compute", "memory", "network"), key=lambda name: float(getattr(self, name)))

    @property
    def fractions(self) -> tuple[float, float, float]:
        """Fractions of the time in which a device computes, moves its memory, and waits."""
        computing, moving = self.compute / self.seconds, self.memory / self.seconds
        return computing, moving, max(0.0, 1.0 - computing - moving)


def step_time(
    config: BackboneConfig,
    vocabulary: int,
    stored: Weights,
    tier: Tier,
    budget: DeviceBudget,
    tokens: int,
    keys: float,
    cluster: Cluster,
    every: int = 1,
) -> StepTime:
    """One step of T tokens per device, each of which attends to `keys` keys; of `every` blocks one input is kept."""
    # A block that is recomputed runs forward again for its backward pass, and for the input of the next of its group.
    passes = 2.0 + (every - 1) / every + 2.0 if tier.layerwise else 3.0
    weights = weights_per_token(config, vocabulary)
    dense = passes * (2.0 * weights.others + attention_operations(config, keys)) * tokens
    experts = passes * 2.0 * weights.experts * tokens
    compute = dense / cluster.dense_rate + experts / cluster.expert_rate
    # Each device reads its part of the experts and all other weights; then every state is read and written once.
    read = stored.experts / cluster.devices + stored.others
    moved = read * tier.weights * (READS + (1 if tier.layerwise else 0))
    moved += 2.0 * stored.total / cluster.devices * tier.kept
    # For the forward and for the backward pass, and once more if a group's inputs are recomputed; written back
    # beside the last.
    into_device = budget.host * (2 if every == 1 else 3)
    network = all_to_all(config, tokens, passes, cluster) + reduction(stored, cluster)
    return StepTime(compute, moved / cluster.memory_rate, into_device / cluster.host_link, network)


def all_to_all(config: BackboneConfig, tokens: int, passes: float, cluster: Cluster) -> float:
    """Seconds of sending rows to their experts and results back, in bf16; gradients take the same way back.

    A row goes to each device with equal probability: (g-1)/n stay in the node, (n-g)/n leave it.
    """
    parts = [config.feed_forward(layer) for layer in range(config.num_layers)]
    rows = float(sum(part.experts_per_token for part in parts if isinstance(part, ExpertsConfig)))
    # Dispatch and combine: forward, backward, and once more if blocks are recomputed.
    exchanges = 2 * (passes - 1)
    moved = tokens * rows * config.hidden_size * 2.0 * exchanges
    n, g = cluster.devices, cluster.per_node
    inside, outside = moved * (min(g, n) - 1) / n, moved * max(0, n - g) / n
    return max(inside / cluster.p2p_link, outside / cluster.network)


def reduction(stored: Weights, cluster: Cluster) -> float:
    """Seconds of summing the gradients of what every device holds, in bf16, first within nodes, then between them."""
    if cluster.devices == 1:
        return 0.0
    gradient = 2.0 * stored.others
    outside = 2.0 * gradient / cluster.per_node / cluster.network
    return 2.0 * gradient / cluster.p2p_link + (outside if cluster.devices > cluster.per_node else 0.0)
