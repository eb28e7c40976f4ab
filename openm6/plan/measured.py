"""One training stage on this machine, from what its parts were measured to take."""

# Letters: T tokens a step, D width, V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from openm6.models.config import BackboneConfig
from openm6.parallel.streaming_config import StreamingConfig
from openm6.plan.activations import Activations
from openm6.plan.budget import BY_OPTIMIZER, DeviceBudget, Tier, kept_inputs
from openm6.plan.ceilings import TrainingRates, Way
from openm6.plan.cost import (
    Causes,
    adapter_causes,
    attention_causes,
    head_causes,
    network_causes,
    network_part,
    update_causes,
)
from openm6.plan.examples import Load, step_load
from openm6.plan.growth import Growth, remembered_bytes, saving_bytes, varied_bytes
from openm6.plan.question import Model, Question
from openm6.plan.step_time import StepTime, forward_passes
from openm6.plan.work import PASSES, Stored, largest_layer

# Bytes of what a processor keeps between products: fp32, also where the products run in bf16. Factors are then kept
# rounded, which takes up to a sixth less; the measured `gap` of a way of training has that in it.
ELEMENT = 4
PIECE = 128  # queries that a processor multiplies with their keys at once
LOGITS_A_TOKEN = 2  # copies of a learned token's logits that exist at once
LONG = 10_000  # steps of a run of which nobody says how long it is
SECONDS_A_DAY = 86_400.0
EDGE_BYTES = 16  # of each parameter outside the blocks: its weight, two moments and its gradient


@dataclass(frozen=True)
class Setting:
    """How a step is taken: by which way, by how many processes, with blocks streamed or not."""

    way: Way
    processes: int
    streaming: StreamingConfig | None


def choose_way(rates: TrainingRates, workers: int | None, streaming: StreamingConfig | None) -> Setting:
    """One process where blocks are streamed or one is asked for, else as many as cores, or as asked for."""
    alone = streaming is not None or workers == 1 or rates.team.processes == 1
    if alone:
        return Setting(rates.alone, 1, streaming)
    return Setting(rates.team, workers or rates.team.processes, None)


def load_of(model: Model, rates: TrainingRates, tokens: int) -> Load:
    """What rows of so many places hold; a preset brings no data, so they are filled with text."""
    if model.rows is None:
        words = {"text": float(tokens)}
        texts = tokens / model.length
        pairs, pieces = tokens * model.length / 2, texts * -(-model.length // PIECE)
        return Load(tokens, texts, pairs, pieces, 0.0, words, words)
    return step_load(model.lessons, rates.examples, tokens * rates.fill)


def measured_time(
    config: BackboneConfig,
    vocabulary: int,
    stored: Stored,
    tier: Tier,
    load: Load,
    setting: Setting,
    rates: TrainingRates,
) -> StepTime:
    """Seconds of one step: every part of it in one of its processes, the data, and the update."""
    way, part = setting.way, load.times(1.0 / setting.processes)
    layers = sum(_seconds(way, name, causes) for name, causes in _layers(config, part))
    if setting.streaming is not None:
        layers *= (forward_passes(setting.streaming.recompute_every) + 2.0) / PASSES
    ends = sum(_seconds(way, name, causes) for name, causes in _ends(config.width, vocabulary, part))
    data = (load.seconds + rates.token * load.tokens) / rates.team.processes
    seconds = (layers + ends + data) * way.stretch + way.step + way.code * load.codes
    update = sum(_seconds(way, name, causes) for name, causes in _updates(config, stored, tier, setting))
    return StepTime(seconds, update * way.stretch, 0.0, 0.0)


def measured_budget(
    config: BackboneConfig,
    vocabulary: int,
    stored: Stored,
    tier: Tier,
    load: Load,
    setting: Setting,
) -> DeviceBudget:
    """Bytes of all processes of a run together."""
    way = setting.way
    if setting.streaming is not None:
        states, step = _streamed_bytes(config, stored, tier, load.tokens, setting.streaming)
    else:
        states, step = _resident_bytes(config, vocabulary, stored, tier, load, setting.processes)
    added = step * way.gap + load.words * way.word_bytes + load.codes * way.code_bytes
    fixed = way.process + expert_processes(config, setting.processes) * way.expert_bytes
    return DeviceBudget(states * way.gap, added, 0.0, fixed, 0.0, round(load.tokens))


def expert_processes(config: BackboneConfig, processes: int) -> int:
    """Of so many processes those in which experts are at work."""
    return processes if config.experts is not None else 0


def measured_growth(
    question: Question,
    rates: TrainingRates,
    setting: Setting,
    load: Load,
    budget: DeviceBudget,
    moments: float,
    seconds: float,
) -> Growth:
    """What comes on top of `budget` until the end of a run of steps of so many seconds. moments: bytes of all."""
    model, steps = question.model, steps_of(question, load.tokens, seconds)
    saves = (steps - 1) // model.save_every
    if question.steps is None:
        saves = max(1.0, saves)
    return Growth(
        steps,
        remembered_bytes(model.lessons, rates.examples, rates.memories, steps * load.examples),
        varied_bytes(budget.activations, load, steps),
        saving_bytes(moments, setting.processes, max(0.0, saves)),
    )


def steps_of(question: Question, tokens: float, seconds: float) -> float:
    """Steps of a run whose steps take so many tokens and seconds."""
    model = question.model
    if question.steps is not None:
        return question.steps
    if question.tokens is not None:
        return question.tokens / tokens
    if question.days is not None:
        return question.days * SECONDS_A_DAY / seconds
    if model.steps is not None:
        return model.steps
    return LONG if model.minutes is None else 60 * model.minutes / seconds


def optimizer_of(tier: Tier) -> str:
    """The optimizer whose states a tier holds."""
    return next((name for name, bytes_ in BY_OPTIMIZER.items() if bytes_ == tier.bytes), "adafactor")


def _layers(config: BackboneConfig, load: Load) -> Iterator[tuple[str, Causes]]:
    attention = attention_causes(config, load.tokens, load.pairs, load.pieces)
    for layer in range(config.num_layers):
        part = config.feed_forward(layer)
        yield "attention", attention
        yield network_part(part), network_causes(config.width, part, load.tokens)


def _ends(width: int, vocabulary: int, load: Load) -> Iterator[tuple[str, Causes]]:
    """Adapters on the way in and out, and the output layer."""
    for kind, count in load.read.items():
        yield f"read {kind}", adapter_causes(width, count)
    for kind, count in load.learned.items():
        if kind == "text":
            yield "head", head_causes(width, vocabulary, count)
        elif count:
            yield f"learn {kind}", adapter_causes(width, count)


def _updates(
    config: BackboneConfig, stored: Stored, tier: Tier, setting: Setting
) -> Iterator[tuple[str, Causes]]:
    if setting.streaming is None:
        yield f"update {optimizer_of(tier)}", update_causes(stored.total)
        return
    blocks = _blocks(config)
    yield "update adamw", update_causes(stored.total - blocks)
    for _ in range(config.num_sets):
        yield f"rule {tier.bytes}", update_causes(blocks / config.num_sets)
    groups = setting.streaming.recompute_every
    for _ in range((2 if groups == 1 else 3) * config.num_layers):
        yield f"fetch {tier.bytes}", update_causes(blocks / config.num_sets)


def _blocks(config: BackboneConfig) -> float:
    """Parameters of all weight sets; norms and routers, a part in a hundred, are counted with them."""
    return float(largest_layer(config) * config.num_sets)


def _resident_bytes(
    config: BackboneConfig, vocabulary: int, stored: Stored, tier: Tier, load: Load, processes: int
) -> tuple[float, float]:
    """States, and what a step adds to them.

    In each process gradients come as activations go, so the larger of the two counts; weights are shared, and each
    process hands the others a copy of its gradients of what they own.
    """
    kept = load.tokens * Activations(by_expert=True).bytes_a_token(config, ELEMENT)
    logits = load.words * vocabulary * ELEMENT * LOGITS_A_TOKEN
    states = stored.total * (tier.weights + tier.moments + (processes - 1) * tier.gradients)
    return states, max(kept + logits, processes * stored.total * tier.gradients)


def _streamed_bytes(
    config: BackboneConfig, stored: Stored, tier: Tier, tokens: float, streaming: StreamingConfig
) -> tuple[float, float]:
    """States with their buffers, and what a step adds: a layer's activations, weights and gradients, and the inputs
    of layers.
    """
    blocks = _blocks(config)
    largest = blocks / config.num_sets
    kept = tier.weights + tier.moments
    stays = streaming.resident == "auto" or streaming.resident == config.num_sets
    buffers = 0.0 if stays else streaming.buffers * largest * kept
    states = blocks * kept + buffers + (stored.total - blocks) * EDGE_BYTES
    copies = 1 if tier.bytes == 16 else 2  # of the set in use: its gradient, and its weights in fp32
    part = tokens / streaming.micro_batches
    inputs = tokens * config.width * ELEMENT * kept_inputs(config.num_layers, streaming.recompute_every)
    return states, copies * largest * ELEMENT + part * Activations(by_expert=True).largest_layer(
        config, ELEMENT
    ) + inputs


def _seconds(way: Way, part: str, causes: Causes) -> float:
    """Of a part; one that was not measured takes as long as the slowest of its family that was."""
    if part in way.parts:
        return way.parts[part].seconds(causes)
    family = part.partition(" ")[0]
    return max(
        (cost.seconds(causes) for name, cost in way.parts.items() if name.partition(" ")[0] == family),
        default=0.0,
    )
