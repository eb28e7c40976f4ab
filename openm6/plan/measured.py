"""One training stage on this machine, from rates that were measured on it part by part."""

# Letters: T tokens a step, D width, F hidden, V vocabulary

from __future__ import annotations

from dataclasses import dataclass

from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig, matrices_of
from openm6.plan.activations import Activations
from openm6.plan.budget import BY_OPTIMIZER, DeviceBudget, Tier
from openm6.plan.ceilings import TrainingRates
from openm6.plan.step_time import StepTime
from openm6.plan.work import PASSES, Stored, attention_operations


@dataclass(frozen=True)
class Load:
    """What a step brings: keys that a token sees, share of tokens with a text answer, processes that share it.

    text_only: whether all data is text.
    """

    keys: float
    learned: float
    workers: int
    text_only: bool = False


ELEMENT = 4  # bytes: a processor trains in fp32
LOGITS_A_TOKEN = 2  # copies of a learned token's logits that exist at once


def measured_budget(
    config: BackboneConfig,
    vocabulary: int,
    stored: Stored,
    tier: Tier,
    tokens: int,
    load: Load,
    rates: TrainingRates,
) -> DeviceBudget:
    """Bytes of all processes of a run together.

    In each, gradients come as activations go, so the larger of the two counts; weights are shared, and each process
    hands the others a copy of its gradients of what they own.
    """
    part = tokens / load.workers
    kept = part * Activations().bytes_a_token(config, ELEMENT)
    logits = load.learned * part * vocabulary * ELEMENT * LOGITS_A_TOKEN
    states = stored.total * (tier.weights + tier.moments + (load.workers - 1) * tier.gradients)
    step = load.workers * max(kept + logits, stored.total * tier.gradients)
    each = rates.text_token_bytes if load.text_only else rates.token_bytes
    added = step * rates.gap + tokens * each
    return DeviceBudget(states * rates.gap, added, 0.0, rates.process, 0.0, tokens)


def measured_time(
    config: BackboneConfig,
    vocabulary: int,
    stored: Stored,
    optimizer: str,
    tokens: int,
    load: Load,
    rates: TrainingRates,
) -> StepTime:
    """Seconds of one step: each part's operations at the rate of a part of its size, then the update."""
    keys, learned = load.keys, load.learned
    seconds = PASSES * attention_operations(config, keys) * tokens / rates.attention.at(_projection(config))
    for layer in range(config.num_layers):
        part = config.feed_forward(layer)
        network = matrices_of(part.ffn) * config.width * part.hidden
        projection = _projection(config)
        seconds += 2 * PASSES * projection * tokens / rates.attention.at(projection)
        if isinstance(part, DenseConfig):
            seconds += 2 * PASSES * network * tokens / rates.dense.at(network)
        else:
            rows = part.choices * (part.capacity or 1.0) * tokens
            seconds += 2 * PASSES * network * rows / rates.experts.at(network)
            seconds += 2 * PASSES * network * part.num_shared * tokens / rates.dense.at(network)
    output = vocabulary * config.width
    seconds += 2 * PASSES * output * learned * tokens / rates.head.at(output)
    update = stored.total / rates.update.get(optimizer, min(rates.update.values()))
    each = rates.text_token if load.text_only else rates.token
    seconds = seconds * rates.stretch + rates.step + tokens * each
    return StepTime(seconds, update * rates.stretch, 0.0, 0.0)


def optimizer_of(tier: Tier) -> str:
    """The optimizer whose states a tier holds."""
    return next((name for name, bytes_ in BY_OPTIMIZER.items() if bytes_ == tier.bytes), "adafactor")


def _projection(config: BackboneConfig) -> int:
    return config.width * 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
