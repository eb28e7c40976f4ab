"""The plan of a run: bytes, seconds, joules and money, whether it fits, and the smallest sufficient machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from openm6.energy.carbon import GPT3_MWH, JOULES_PER_KWH, grid
from openm6.energy.meter import EnergyConfig
from openm6.models.config import BackboneConfig, count_parameters
from openm6.plan.hardware import GIB, Cluster, ClusterOptions, Gpu, gpu_cluster
from openm6.plan.memory import BY_OPTIMIZER, TIERS, DeviceBudget, Tier, device_budget
from openm6.plan.model_cost import max_layer_parameters, operations_per_token, stored_parameters
from openm6.plan.request import Model, PlanRequest
from openm6.plan.step_time import StepTime, step_time

SECONDS_PER_DAY = 86_400.0
TOKENS_PER_PARAMETER = 20  # of the active ones, by default (arXiv 2203.15556)
LOGITS_AT_ONCE = 2048  # tokens whose logits exist at the same time, with their gradient 8 bytes each
MIN_BATCH = 256  # tokens per step of one device that a smaller batch is proposed down to
MAX_NODES = 1 << 17
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
    stages = {"real": _first_fit(request, cluster, model.backbone, _allowed_tiers(request))}
    if model.backbone.sharing is None and model.backbone.num_layers > 1:
        shared = model.backbone.model_copy(update={"sharing": "all"})
        stages["pseudo"] = _first_fit(request, cluster, shared, ((stages["real"].tier.bytes, True),))
    pseudo = request.pseudo_fraction if "pseudo" in stages else 0.0
    fractions = {"real": 1.0 - pseudo, "pseudo": pseudo}
    days_per_token = sum(fractions[name] / stage.tokens_per_day for name, stage in stages.items())
    active = count_parameters(model.backbone).active + model.vocabulary * model.backbone.hidden_size
    if request.tokens is None and request.days is not None:
        tokens, days = request.days / days_per_token, request.days
    else:
        tokens = request.tokens or float(TOKENS_PER_PARAMETER * active)
        days = tokens * days_per_token
    seconds, joules = 0.0, 0.0
    for name, stage in stages.items():
        own = tokens * fractions[name] / stage.tokens_per_day * SECONDS_PER_DAY
        seconds += own
        joules += own * cluster.devices * cluster.draw(*stage.time.fractions)
    return Plan(
        model=model,
        cluster=cluster,
        total=int(stored_parameters(model.backbone, model.vocabulary, model.adapters).total),
        active=active,
        operations=operations_per_token(model.backbone, model.vocabulary, model.seq_len / 2),
        stages=stages,
        pseudo_fraction=pseudo,
        tokens=tokens,
        days=days,
        energy=_energy(request.energy, joules, seconds * cluster.devices * cluster.watts, tokens),
        cost=None if cluster.price is None else cluster.price * days * 24 * cluster.devices,
    )


def _allowed_tiers(request: PlanRequest) -> Tiers:
    """The tiers among which the first that fits is chosen."""
    model = request.model
    chosen = request.bytes_per_parameter or model.bytes_per_parameter
    if chosen is not None:
        return ((chosen, True),)
    return PREFERENCE if model.optimizer is None else ((BY_OPTIMIZER.get(model.optimizer, 16), False),)


def _first_fit(request: PlanRequest, cluster: Cluster, config: BackboneConfig, tiers: Tiers) -> StagePlan:
    """A stage at the first tier that fits, or the last."""
    for bytes_, may_offload in tiers:
        stage = _stage(request, cluster, config, TIERS[bytes_], may_offload)
        if stage.fits:
            break
    return stage


def _stage(request: PlanRequest, cluster: Cluster, config: BackboneConfig, tier: Tier, may_offload: bool) -> StagePlan:
    model, n = request.model, cluster.devices
    every = request.activation_checkpointing_every or model.activation_checkpointing_every
    stored = stored_parameters(config, model.vocabulary, model.adapters)
    tokens = request.batch or model.batch
    layer = max_layer_parameters(config)
    in_experts = layer * stored.experts / stored.total
    held = in_experts / n + layer - in_experts
    logits = 8.0 * min(tokens, LOGITS_AT_ONCE) * model.vocabulary
    budget = device_budget(config, stored.total / n, held, tier, tokens, cluster.memory, logits, every)
    keys = model.seq_len / 2
    time = step_time(config, model.vocabulary, stored, tier, budget, tokens, keys, cluster, every)
    on_host = budget.host <= cluster.host_memory if may_offload else budget.host == 0
    fits = budget.device <= cluster.memory and on_host
    return StagePlan(int(stored.total), tier, budget, time, tokens * n, fits)


def _energy(config: EnergyConfig, joules: float, rated: float, tokens: float) -> Energy:
    current, pue = grid(config.country), config.pue
    mwh, mwh_rated = (joule * pue / JOULES_PER_KWH / 1000 for joule in (joules, rated))
    words = f"{current.name}, {current.grams_per_kwh:g} g/kWh ({current.year})"
    return Energy(joules * pue / tokens, mwh, mwh_rated, current.grams(joules, pue) / 1000, words)


def plan_json(
    request: PlanRequest, card: Gpu, options: ClusterOptions, known: Iterable[Gpu] = ()
) -> tuple[Plan, dict[str, Any]]:
    """The plan and its JSON, with the smallest number of GPUs and the changes that would make it fit.

    known: GPUs that may be proposed instead.
    """
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
    low, high = 0, 1  # nodes that are too few, nodes that may suffice
    while not on(high * node).fits:
        low, high = high, high * 2
        if high > MAX_NODES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if on(middle * node).fits else (middle, high)
    return on(high * node)


def _changes(
    request: PlanRequest,
    plan: Plan,
    card: Gpu,
    options: ClusterOptions,
    known: Iterable[Gpu],
    least: Plan | None,
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
