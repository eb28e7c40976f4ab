"""The plan of a run: bytes, seconds, joules and money, whether it fits, the smallest sufficient machine, and sweeps.

First what training costs: operations and weights that one token meets, and seconds of a step by concern.
"""

# Shapes: D width, H·d attention width, K choices, S keys of a token; n devices, g of them in a node, T tokens of one

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from openm6.core.errors import ConfigError, nearest
from openm6.energy.carbon import GPT3_MWH, JOULES_PER_KWH, grid
from openm6.energy.meter import EnergyConfig
from openm6.models.config import BackboneConfig, count_parameters, modality_parameters
from openm6.nn.config import DenseConfig, ExpertsConfig, matrices_of
from openm6.plan.hardware import COMPUTING, GIB, MOVING, OTHER_PARTS, WAITING, Cluster, ClusterOptions, Gpu, gpu_cluster
from openm6.plan.memory import BY_OPTIMIZER, LAYERWISE_ADAM, TIERS, DeviceBudget, Tier, device_budget
from openm6.plan.request import Model, PlanRequest

READS = 3  # of every weight in a step: forward, backward for inputs, backward for weights (or recomputation)


@dataclass(frozen=True)
class Weights:
    experts: float
    others: float

    @property
    def total(self) -> float:
        return self.experts + self.others


def weights_per_token(config: BackboneConfig, vocabulary: int) -> Weights:
    """Weights that one token is multiplied with in a forward pass, the output layer included; no norms or look-ups.

    Of experts for tokens of some modalities the largest are counted, as if every token passed them.
    """
    experts, others = 0.0, float(vocabulary * config.hidden_size)
    added = [modality_parameters(config, one).active for one in config.modality_experts]
    others += config.num_layers * max(added, default=0)
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


def matrix_parameters(config: BackboneConfig) -> int:
    """Parameters of attention, dense networks and experts, those of layers that share weights once."""
    attention = config.hidden_size * 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    total = 0
    for layer, first in enumerate(config.shared_with):
        part = config.feed_forward(layer)
        network = matrices_of(part.hidden_act) * config.hidden_size * part.intermediate_size
        count = 1 if isinstance(part, DenseConfig) else part.num_experts + part.num_shared
        total += (attention + count * network) * (first == layer)
    return total


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


SECONDS_PER_DAY = 86_400.0
TOKENS_PER_PARAMETER = 20  # of the active ones, by default (arXiv 2203.15556)
LOGITS_AT_ONCE = 2048  # tokens whose logits exist at the same time, with their gradient 8 bytes each
MIN_BATCH = 256  # tokens per step of one device that a smaller batch is proposed down to
MAX_NODES = 1 << 17
AXES = {"gpus": "GPUs", "bytes": "bytes per parameter", "batch": "tokens per step on each GPU"}  # of a sweep
FACTORS = (0.25, 0.5, 1, 2, 4)
Tiers = tuple[tuple[int, bool], ...]
"""Bytes per parameter, with whether the host may hold what the devices cannot."""
PREFERENCE: Tiers = ((16, False), (4, False), (2, False), (2, True), (1, False), (1, True))


@dataclass(frozen=True)
class StagePlan:
    """One stage: its parameters, where their bytes lie (of one device), and the time of a step."""

    parameters: int
    tier: Tier
    budget: DeviceBudget
    time: StepTime
    tokens: int  # per step, all devices together
    fits: bool

    @property
    def tokens_per_day(self) -> float:
        return self.tokens / self.time.seconds * SECONDS_PER_DAY

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "step_seconds": self.time.seconds,
            "seconds": asdict(self.time),
            "bottleneck": self.time.bottleneck,
            "tokens_per_day": self.tokens_per_day,
            "host_bytes_per_gpu": self.budget.host,
            "micro_batch": self.budget.micro_batch,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class Energy:
    """Joules of a run with the building's PUE, expected and at most (devices at their rating all the time)."""

    joules_per_token: float
    mwh: float
    mwh_rated: float
    kg_co2e: float
    grid: str


@dataclass(frozen=True)
class Plan:
    """The plan of a run on one cluster; `operations` are those of training on one token."""

    model: Model
    cluster: Cluster
    total: int
    active: int
    operations: float
    stages: Mapping[str, StagePlan]
    pseudo_fraction: float
    tokens: float
    days: float
    energy: Energy
    cost: float | None

    @property
    def real(self) -> StagePlan:
        return self.stages["real"]

    @property
    def fits(self) -> bool:
        return self.real.fits

    @property
    def bytes(self) -> dict[str, float]:
        """Of all devices together: the model's states on the devices and in the hosts, and what a step adds."""
        budget, devices = self.real.budget, self.cluster.devices
        added = budget.activations + budget.working + budget.context
        return {"gpu": budget.states * devices, "host": budget.host * devices, "step": added * devices}

    def to_json(self) -> dict[str, Any]:
        """The documented schema, without `smallest`, which `plan_json` adds."""
        real = self.real
        return {
            "model": self.model.name,
            "machine": self.cluster.name,
            "parameters": {"total": self.total, "active": self.active},
            "flops_per_token": self.operations,
            "bytes_per_parameter": real.tier.bytes,
            "bytes": self.bytes,
            "bytes_per_gpu": {"used": real.budget.device, "usable": self.cluster.memory},
            "step_seconds": real.time.seconds,
            "step_tokens": real.tokens,
            "bottleneck": real.time.bottleneck,
            "stages": {name: stage.to_json() for name, stage in self.stages.items()},
            "pseudo_fraction": self.pseudo_fraction,
            "tokens_per_day": self.tokens / self.days,
            "tokens": self.tokens,
            "days": self.days,
            "energy": {**asdict(self.energy), "of_gpt3": self.energy.mwh / GPT3_MWH},
            "cost_usd": self.cost,
            "fits": self.fits,
            "assumed": list(self.cluster.assumed),
        }


def make_plan(request: PlanRequest, cluster: Cluster) -> Plan:
    """The plan of a run on a cluster, with the requested bytes per parameter or the most that fit."""
    model = request.model
    tiers = PREFERENCE if model.optimizer is None else ((BY_OPTIMIZER.get(model.optimizer, 16), False),)
    if chosen := request.bytes_per_parameter or model.bytes_per_parameter or (16 if model.offloaded else None):
        tiers = ((chosen, True),)
    stages = {"real": _stage(request, cluster, model.backbone, tiers)}
    if model.backbone.sharing is None and model.backbone.num_layers > 1:
        shared = model.backbone.model_copy(update={"sharing": "all"})
        stages["pseudo"] = _stage(request, cluster, shared, ((stages["real"].tier.bytes, True),))
    pseudo = request.pseudo_fraction if "pseudo" in stages else 0.0
    fractions = {"real": 1.0 - pseudo, "pseudo": pseudo}
    days_per_token = sum(fractions[name] / stage.tokens_per_day for name, stage in stages.items())
    total = int(stored_parameters(model.backbone, model.vocabulary, model.adapters).total)
    count = count_parameters(model.backbone)
    active = total - (count.total - count.active)
    if request.tokens is None and request.days is not None:
        tokens, days = request.days / days_per_token, request.days
    else:
        tokens = request.tokens or float(TOKENS_PER_PARAMETER * active)
        days = tokens * days_per_token
    seconds, joules = 0.0, 0.0
    for name, stage in stages.items():
        own = tokens * fractions[name] / stage.tokens_per_day * SECONDS_PER_DAY
        seconds += own
        joules += own * cluster.devices * stage.time.watts(cluster)
    operations = operations_per_token(model.backbone, model.vocabulary, model.seq_len / 2)
    energy = energy_of(request.energy, joules, seconds * cluster.devices * cluster.watts, tokens)
    cost = None if cluster.price is None else cluster.price * days * 24 * cluster.devices
    return Plan(model, cluster, total, active, operations, stages, pseudo, tokens, days, energy, cost)


def _stage(request: PlanRequest, cluster: Cluster, config: BackboneConfig, tiers: Tiers) -> StagePlan:
    """A stage at the first tier that fits, or the last."""
    model, n, keys = request.model, cluster.devices, request.model.seq_len / 2
    every = request.activation_checkpointing_every or model.activation_checkpointing_every
    stored, layer = stored_parameters(config, model.vocabulary, model.adapters), max_layer_parameters(config)
    tokens = request.batch or model.tokens_on(n)
    in_experts = layer * stored.experts / stored.total
    held = in_experts / n + layer - in_experts
    logits = 8.0 * min(tokens, LOGITS_AT_ONCE) * model.vocabulary
    for bytes_, may_offload in tiers:
        tier = LAYERWISE_ADAM if bytes_ == 16 and model.offloaded else TIERS[bytes_]
        # Matrices are divided among the devices, and all else too unless layers are trained one by one.
        divided = matrix_parameters(config) if tier.layerwise else stored.total
        budget = device_budget(
            config, divided / n, held, tier, tokens, cluster.memory, logits, every, stored.total - divided, layer / n
        )
        on_host = budget.host <= cluster.host_memory if may_offload else budget.host == 0
        if fits := budget.device <= cluster.memory and on_host:
            break
    time = step_time(config, model.vocabulary, stored, tier, budget, tokens, keys, cluster, every)
    return StagePlan(int(stored.total), tier, budget, time, tokens * n, fits)


def energy_of(config: EnergyConfig, joules: float, rated: float, tokens: float) -> Energy:
    """Of a run that draws so many joules, and at most those `rated`, without the building's PUE."""
    current, pue = grid(config.country), config.pue
    mwh, mwh_rated = (joule * pue / JOULES_PER_KWH / 1000 for joule in (joules, rated))
    words = f"{current.name}, {current.grams_per_kwh:g} g/kWh ({current.year})"
    return Energy(joules * pue / tokens, mwh, mwh_rated, current.grams(joules, pue) / 1000, words)


def plan_json(
    request: PlanRequest, card: Gpu, options: ClusterOptions, known: Iterable[Gpu] = ()
) -> tuple[Plan, dict[str, Any]]:
    """The plan and its JSON with the least number of GPUs and changes that would make it fit, such as a `known` GPU."""
    plan, least = make_plan(request, gpu_cluster(card, options)), smallest_count(request, card, options)
    smallest = {
        "gpu": card.kind,
        "gpus": least and least.cluster.devices,
        "bytes_per_parameter": least and least.real.tier.bytes,
        "changes": [] if plan.fits else _changes(request, plan, card, options, known, least),
    }
    return plan, {**plan.to_json(), "smallest": smallest}


def smallest_count(request: PlanRequest, card: Gpu, options: ClusterOptions) -> Plan | None:
    """The plan on the minimum of GPUs of this kind that hold the model: fewer than a node's, or whole nodes."""

    def on(count: int) -> Plan:
        return make_plan(request, gpu_cluster(card, replace(options, devices=count)))

    node = options.per_node
    for count in (1, 2, 4):
        if count < node and (plan := on(count)).fits:
            return plan
    nodes = bisect.bisect_left(range(1, MAX_NODES + 1), True, key=lambda nodes: on(nodes * node).fits) + 1
    return on(nodes * node) if nodes <= MAX_NODES else None


def _changes(
    request: PlanRequest, plan: Plan, card: Gpu, options: ClusterOptions, known: Iterable[Gpu], least: Plan | None
) -> list[str]:
    """One change each that would make a run fit that does not, from the easiest to the most expensive."""
    found, cluster = [], plan.cluster
    for bytes_ in (8, 4, 2, 1):
        smaller = replace(request, bytes_per_parameter=bytes_)
        if bytes_ < plan.real.tier.bytes and make_plan(smaller, cluster).fits:
            found.append(f"{bytes_} bytes per parameter ({TIERS[bytes_].description})")
            break
    batch = plan.real.tokens // cluster.devices
    while batch > MIN_BATCH:
        batch //= 2
        if make_plan(replace(request, batch=batch), cluster).fits:
            found.append(f"{batch:,} tokens per step on each GPU")
            break
    if plan.real.tier.layerwise and plan.real.budget.host > cluster.host_memory:
        gib = -(-plan.real.budget.host * cluster.per_node / GIB // 64) * 64  # of a node, rounded up to 64
        if make_plan(request, replace(cluster, host_memory=gib * GIB / cluster.per_node)).fits:
            found.append(f"{gib:,.0f} GiB of host memory per node")
    if least is not None:
        found.append(f"{least.cluster.devices:,} × {card.name}")
    for larger in sorted((one for one in known if one.memory > card.memory), key=lambda one: one.memory):
        if make_plan(request, gpu_cluster(larger, options)).fits:
            found.append(f"{options.devices:,} × {larger.name}")
            break
    return found


def sweep_plans(request: PlanRequest, card: Gpu, options: ClusterOptions, kind: str) -> list[tuple[int, Plan]]:
    """A plan for each value of `kind`: GPUs from a quarter of the requested number to four times as many, all tiers, or
    batches from a quarter to four times the size; another kind is a ConfigError."""
    if kind not in AXES:
        raise ConfigError(f"--sweep {kind!r} is not known; {nearest(kind, list(AXES))}")
    if kind == "gpus":
        counts = sorted({max(1, round(options.devices * factor)) for factor in FACTORS})
        return [(count, make_plan(request, gpu_cluster(card, replace(options, devices=count)))) for count in counts]
    if kind == "bytes":
        requests = {size: replace(request, bytes_per_parameter=size) for size in TIERS}
    else:
        tokens = request.batch or request.model.tokens_on(options.devices)
        sizes = [max(1, round(tokens * factor)) for factor in FACTORS]
        requests = {size: replace(request, batch=size) for size in sizes}
    return [(value, make_plan(one, gpu_cluster(card, options))) for value, one in requests.items()]


def draw_sweep(rows: list[tuple[int, Plan]], kind: str, path: Path) -> None:
    """Plot tokens per day and joules per token over the value that was changed; plans that do not fit are hollow."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional package
        from matplotlib.ticker import FuncFormatter, LogLocator  # noqa: PLC0415
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install '.[report]'") from None
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    values = [value for value, _ in rows]
    series = {
        "tokens per day": [plan.tokens / plan.days for _, plan in rows],
        "joules per token": [plan.energy.joules_per_token for _, plan in rows],
    }
    colours = ["C0" if plan.fits else "white" for _, plan in rows]
    for axes, (title, heights) in zip(figure.subplots(1, 2), series.items(), strict=True):
        axes.plot(values, heights, color="0.6", zorder=1)
        axes.scatter(values, heights, c=colours, edgecolors="C0", zorder=2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda height, _: _short(height)))
        axes.yaxis.set_minor_formatter("")
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.minorticks_off()
        axes.set_xlabel(AXES[kind])
        axes.set_title(title)
    if not all(plan.fits for _, plan in rows):
        figure.suptitle("hollow: does not fit", fontsize="small", color="0.4")
    figure.savefig(path)


def _short(number: float) -> str:
    """Such as `1.5B` or `0.02`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
