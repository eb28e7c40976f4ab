"""The plan of a run: bytes, seconds, joules and money, whether it fits, and the smallest machine that would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from openm6.energy.carbon import GPT3_MWH, JOULES_PER_KWH, grid
from openm6.energy.meter import EnergyConfig
from openm6.models.config import BackboneConfig, count_parameters
from openm6.plan.hardware import GIB, Cluster, ClusterOptions, Gpu, gpu_cluster
from openm6.plan.memory import BY_OPTIMIZER, TIERS, DeviceBudget, Tier, device_budget
from openm6.plan.model_cost import max_layer_parameters, operations_per_token, stored_parameters
from openm6.plan.request import Model, PlanRequest, PlanTarget
from openm6.plan.step_time import StepTime, step_time

SECONDS_PER_DAY = 86_400.0
BATCH = 16_384  # tokens a step of one device, by default
TOKENS_PER_PARAMETER = 20  # of the active ones, by default (arXiv 2203.15556)
LOGITS_AT_ONCE = 2048  # tokens whose logits exist at the same time, with their gradient 8 bytes each
MAX_NODES = 1 << 17
# From the most precise to the smallest: a tier with whether the host may hold what the devices cannot.
PREFERENCE = ((16, False), (4, False), (2, False), (2, True), (1, False), (1, True))


@dataclass(frozen=True)
class StagePlan:
    """One stage: its parameters, where their bytes lie (of one device), and the time of a step."""

    name: str
    parameters: int
    tier: Tier
    budget: DeviceBudget
    time: StepTime
    tokens: int  # of a step, all devices together
    fits: bool

    @property
    def tokens_per_day(self) -> float:
        return self.tokens / self.time.seconds * SECONDS_PER_DAY


@dataclass(frozen=True)
class Energy:
    """Joules of a run at the building's meter, expected and at most (devices at their rating all the time)."""

    joules_per_token: float
    mwh: float
    mwh_rated: float
    kg_co2e: float
    grid: str


@dataclass(frozen=True)
class Plan:
    """The plan of a run on one cluster."""

    model: Model
    cluster: Cluster
    total: int
    active: int
    operations: float  # of training on one token
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
        """The documented schema, without `smallest`, which `smallest.answer` adds."""
        real, energy = self.real, self.energy
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
            "stages": {name: _stage_json(stage) for name, stage in self.stages.items()},
            "pseudo_fraction": self.pseudo_fraction,
            "tokens_per_day": self.tokens / self.days,
            "tokens": self.tokens,
            "days": self.days,
            "energy": {
                "joules_per_token": energy.joules_per_token,
                "mwh": energy.mwh,
                "mwh_rated": energy.mwh_rated,
                "kg_co2e": energy.kg_co2e,
                "grid": energy.grid,
                "of_gpt3": energy.mwh / GPT3_MWH,
            },
            "cost_usd": self.cost,
            "fits": self.fits,
            "assumed": list(self.cluster.assumed),
        }


def make_plan(request: PlanRequest, cluster: Cluster) -> Plan:
    """What the run of `request` takes on `cluster`, with the requested bytes per parameter or the most that fit."""
    model = request.model
    pseudo_config = model.backbone.model_copy(update={"sharing": "all"})
    real = _choose(request, cluster, model.backbone)
    allowed = ((real.tier.bytes, True),)
    stages = {"real": real}
    if model.backbone.sharing is None and model.backbone.num_layers > 1:
        stages["pseudo"] = _first_fit(request, cluster, pseudo_config, "pseudo", allowed)
    share = request.pseudo_fraction if "pseudo" in stages else 0.0
    parts = {"real": 1.0 - share, "pseudo": share}
    days_per_token = sum(parts[name] / stage.tokens_per_day for name, stage in stages.items())
    active = count_parameters(model.backbone).active + model.vocabulary * model.backbone.hidden_size
    tokens, days = _length(request, days_per_token, active)
    seconds = {
        name: tokens * parts[name] / stage.tokens_per_day * SECONDS_PER_DAY for name, stage in stages.items()
    }
    hours = days * 24 * cluster.devices
    return Plan(
        model=model,
        cluster=cluster,
        total=stored_parameters(model.backbone, model.vocabulary, model.adapters).total,
        active=active,
        operations=operations_per_token(model.backbone, model.vocabulary, model.length / 2),
        stages=stages,
        pseudo_fraction=share,
        tokens=tokens,
        days=days,
        energy=_energy(stages, seconds, tokens, cluster, request.energy),
        cost=None if cluster.price is None else cluster.price * hours,
    )


def _choose(request: PlanRequest, cluster: Cluster, config: BackboneConfig) -> StagePlan:
    if request.bytes_per_parameter is not None:
        allowed: tuple[tuple[int, bool], ...] = ((request.bytes_per_parameter, True),)
    elif (request.model.bytes_per_parameter or 16) < 16:
        allowed = ((request.model.bytes_per_parameter or 16, True),)
    elif request.model.optimizer is not None:
        allowed = ((BY_OPTIMIZER.get(request.model.optimizer, 16), False),)
    else:
        allowed = PREFERENCE
    return _first_fit(request, cluster, config, "real", allowed)


def _first_fit(
    request: PlanRequest,
    cluster: Cluster,
    config: BackboneConfig,
    name: str,
    allowed: tuple[tuple[int, bool], ...],
) -> StagePlan:
    """The first of the allowed tiers that fits, or the last."""
    for bytes_, may_offload in allowed:
        stage = plan_stage(request, cluster, config, name, TIERS[bytes_], may_offload)
        if stage.fits:
            break
    return stage


def plan_stage(
    request: PlanRequest, cluster: Cluster, config: BackboneConfig, name: str, tier: Tier, may_offload: bool
) -> StagePlan:
    """One stage at one tier."""
    model, n = request.model, cluster.devices
    stored = stored_parameters(config, model.vocabulary, model.adapters)
    tokens = request.batch or (model.rows * model.length if model.rows else BATCH)
    layer = max_layer_parameters(config)
    in_experts = layer * stored.experts / stored.total
    held = in_experts / n + layer - in_experts
    logits = 8.0 * min(tokens, LOGITS_AT_ONCE) * model.vocabulary
    budget = device_budget(
        config, stored.total / n, held, tier, tokens, cluster.memory, logits, request.group
    )
    keys = model.length / 2
    time = step_time(config, model.vocabulary, stored, tier, budget, tokens, keys, cluster, request.group)
    on_host = budget.host <= cluster.host_memory if may_offload else budget.host == 0
    fits = budget.device <= cluster.memory and on_host
    return StagePlan(name, stored.total, tier, budget, time, tokens * n, fits)


def _length(request: PlanRequest, days_per_token: float, active: int) -> tuple[float, float]:
    if request.tokens is None and request.days is not None:
        return request.days / days_per_token, request.days
    tokens = request.tokens or float(TOKENS_PER_PARAMETER * active)
    return tokens, tokens * days_per_token


def _energy(
    stages: Mapping[str, StagePlan],
    seconds: Mapping[str, float],
    tokens: float,
    cluster: Cluster,
    config: EnergyConfig,
) -> Energy:
    current = grid(config.country)
    joules = sum(
        seconds[name] * cluster.devices * cluster.draw(*stage.time.shares) for name, stage in stages.items()
    )
    rated = sum(seconds.values()) * cluster.devices * cluster.watts
    mwh, mwh_rated = (joule * config.pue / JOULES_PER_KWH / 1000 for joule in (joules, rated))
    words = f"{current.name}, {current.grams_per_kwh:g} g/kWh ({current.year})"
    return Energy(
        joules * config.pue / tokens, mwh, mwh_rated, current.grams(joules, config.pue) / 1000, words
    )


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    time = stage.time
    return {
        "parameters": stage.parameters,
        "step_seconds": time.seconds,
        "seconds": {
            "compute": time.compute, "memory": time.memory, "link": time.link, "network": time.network
        },
        "bottleneck": time.bottleneck,
        "tokens_per_day": stage.tokens_per_day,
        "host_bytes_per_gpu": stage.budget.host,
        "micro_batch": stage.budget.micro_batch,
        "fits": stage.fits,
    }  # fmt: skip


def plan_json(request: PlanRequest, target: PlanTarget) -> tuple[Plan, dict[str, Any]]:
    """The plan and its JSON, with the smallest machine that would do."""
    plan = make_plan(request, target.cluster())
    content = plan.to_json()
    content["smallest"] = answer(request, plan, target.gpu, target.options, list(target.known))
    return plan, content


def smallest_count(request: PlanRequest, gpu: Gpu, options: ClusterOptions) -> Plan | None:
    """The plan on the fewest GPUs of this kind that hold the model: fewer than a node's, or whole nodes."""
    node = options.per_node
    inside = [count for count in (1, 2, 4) if count < node]
    for count in inside:
        plan = _on(request, gpu, options, count)
        if plan.fits:
            return plan
    low, high = 0, 1  # nodes that do not do, nodes that may
    while not _on(request, gpu, options, high * node).fits:
        low, high = high, high * 2
        if high > MAX_NODES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if _on(request, gpu, options, middle * node).fits:
            high = middle
        else:
            low = middle
    return _on(request, gpu, options, high * node)


def changes(
    request: PlanRequest, plan: Plan, gpu: Gpu, options: ClusterOptions, known: list[Gpu]
) -> list[str]:
    """One change each that would make a run fit that does not, from the easiest to the dearest."""
    found = []
    for bytes_ in (8, 4, 2, 1):
        if bytes_ < plan.real.tier.bytes and _with_bytes(request, plan.cluster, bytes_).fits:
            found.append(f"{bytes_} bytes per parameter ({TIERS[bytes_].description})")
            break
    batch = plan.real.tokens // plan.cluster.devices
    while batch > 256:
        batch //= 2
        if make_plan(replace(request, batch=batch), plan.cluster).fits:
            found.append(f"{batch:,} tokens per step on each GPU")
            break
    host = _host_memory(request, plan)
    if host is not None:
        found.append(f"{host:,.0f} GiB of host memory per node")
    count = smallest_count(request, gpu, options)
    if count is not None:
        found.append(f"{count.cluster.devices:,} × {gpu.name}")
    larger = sorted((card for card in known if card.memory > gpu.memory), key=lambda card: card.memory)
    for card in larger:
        if make_plan(request, gpu_cluster(card, options)).fits:
            found.append(f"{options.devices:,} × {card.name}")
            break
    return found


def answer(
    request: PlanRequest, plan: Plan, gpu: Gpu, options: ClusterOptions, known: list[Gpu]
) -> dict[str, Any]:
    """The entry `smallest` of a plan's JSON: how few GPUs of the kind would do, and what would make a plan fit."""
    count = smallest_count(request, gpu, options)
    return {
        "gpu": gpu.kind,
        "gpus": None if count is None else count.cluster.devices,
        "bytes_per_parameter": None if count is None else count.real.tier.bytes,
        "changes": [] if plan.fits else changes(request, plan, gpu, options, known),
    }


def _on(request: PlanRequest, gpu: Gpu, options: ClusterOptions, count: int) -> Plan:
    return make_plan(request, gpu_cluster(gpu, replace(options, devices=count)))


def _with_bytes(request: PlanRequest, cluster: Cluster, bytes_: int) -> Plan:
    return make_plan(replace(request, bytes_per_parameter=bytes_), cluster)


def _host_memory(request: PlanRequest, plan: Plan) -> float | None:
    """GiB of a node that would hold what the devices cannot, rounded up to 64; None where that does not help."""
    budget, cluster = plan.real.budget, plan.cluster
    if not plan.real.tier.layerwise or budget.host <= cluster.host_memory:
        return None
    needed = budget.host * cluster.per_node / GIB
    rounded = -(-needed // 64) * 64
    roomy = replace(cluster, host_memory=rounded * GIB / cluster.per_node)
    return rounded if make_plan(request, roomy).fits else None
