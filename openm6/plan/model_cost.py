"""What training costs: operations and weights that one token meets, and seconds of a step on a cluster by concern."""

# Shapes: D width, H·d attention width, K choices, S keys of a token; n devices, g of them in a node, T tokens of one

from __future__ import annotations

from dataclasses import dataclass

from openm6.models.config import BackboneConfig, count_parameters
from openm6.nn.config import DenseConfig, ExpertsConfig, matrices_of
from openm6.plan.hardware import COMPUTING, MOVING, OTHER_PARTS, WAITING, Cluster
from openm6.plan.memory import DeviceBudget, Tier

READS = 3  # of every weight in a step: forward, backward for inputs, backward for weights (or recomputation)


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
    return 3 * (products + attention_operations(config, keys))


def stored_parameters(config: BackboneConfig, vocabulary: int, adapters: bool = False) -> Weights:
    """Backbone and embedding, which is the output layer as well; with `adapters`, those of the other modalities."""
    experts = 0
    for layer, first in enumerate(config.shared_with):
        part = config.feed_forward(layer)
        if isinstance(part, ExpertsConfig) and first == layer:
            network = matrices_of(part.hidden_act) * config.hidden_size * part.intermediate_size
            experts += part.num_experts * network
    total = count_parameters(config).total + vocabulary * config.hidden_size
    if adapters:  # in and out of the backbone, of images, audio and numbers together, with the shipped codecs
        total += 8 * config.hidden_size**2 + 2543 * config.hidden_size + 521_071
    return Weights(experts, total - experts)


def max_layer_parameters(config: BackboneConfig) -> int:
    """Parameters of the largest layer, which is what offloaded training holds on the device at once."""
    alone = {"num_layers": 1, "sharing": None, "dense_layers": (), "moe_layer_freq": 1}
    return count_parameters(config.model_copy(update=alone)).total


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

    def watts(self, cluster: Cluster) -> float:
        """Of one device, by what it does in which part of the time, and of its part of the node."""
        computing, moving = self.compute / self.seconds, self.memory / self.seconds
        waiting = max(0.0, 1.0 - computing - moving)
        return cluster.watts * (COMPUTING * computing + MOVING * moving + WAITING * waiting + OTHER_PARTS)


def step_time(
    config: BackboneConfig, vocabulary: int, stored: Weights, tier: Tier, budget: DeviceBudget, tokens: int,
    keys: float, cluster: Cluster, every: int = 1,
) -> StepTime:  # fmt: skip
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
    # Rows to their experts and back in bf16, forward, backward, and once more if blocks are recomputed. A row goes to
    # each device with equal probability: (g-1)/n stay in the node, (n-g)/n leave it.
    parts = [config.feed_forward(layer) for layer in range(config.num_layers)]
    rows = float(sum(part.experts_per_token for part in parts if isinstance(part, ExpertsConfig)))
    exchanged = tokens * rows * config.hidden_size * 2.0 * 2 * (passes - 1)
    n, g = cluster.devices, cluster.per_node
    inside, outside = exchanged * (min(g, n) - 1) / n, exchanged * max(0, n - g) / n
    network = max(inside / cluster.p2p_link, outside / cluster.network)
    if n > 1:
        # Gradients of what every device holds are summed in bf16, first within nodes, then between them.
        gradient = 2.0 * stored.others
        between = 2.0 * gradient / g / cluster.network if n > g else 0.0
        network += 2.0 * gradient / cluster.p2p_link + between
    return StepTime(compute, moved / cluster.memory_rate, into_device / cluster.host_link, network)
