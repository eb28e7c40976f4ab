"""The smallest machine that would do, and the smallest change that makes a run fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from openm6.base.errors import ConfigError
from openm6.plan.budget import TIERS
from openm6.plan.cluster import Cluster, ClusterOptions, gpu_cluster
from openm6.plan.hardware import GIB, Gpu
from openm6.plan.plan import Plan, make_plan
from openm6.plan.question import Question

MOST_NODES = 1 << 17


def smallest_count(question: Question, gpu: Gpu, options: ClusterOptions) -> Plan | None:
    """The plan on the fewest GPUs of this kind that hold the model: fewer than a node's, or whole nodes."""
    node = options.per_node
    inside = [count for count in (1, 2, 4) if count < node]
    for count in inside:
        plan = _on(question, gpu, options, count)
        if plan.fits:
            return plan
    low, high = 0, 1  # nodes that do not do, nodes that may
    while not _on(question, gpu, options, high * node).fits:
        low, high = high, high * 2
        if high > MOST_NODES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if _on(question, gpu, options, middle * node).fits:
            high = middle
        else:
            low = middle
    return _on(question, gpu, options, high * node)


def changes(question: Question, plan: Plan, gpu: Gpu, options: ClusterOptions, known: list[Gpu]) -> list[str]:
    """One change each that would make a run fit that does not, from the easiest to the dearest."""
    found = []
    for bytes_ in (8, 4, 2, 1):
        if bytes_ < plan.real.tier.bytes and _with_bytes(question, plan.cluster, bytes_).fits:
            found.append(f"{bytes_} bytes a parameter ({TIERS[bytes_].description})")
            break
    batch = plan.real.tokens // plan.cluster.devices
    while batch > 256:
        batch //= 2
        if make_plan(replace(question, batch=batch), plan.cluster).fits:
            found.append(f"{batch:,} tokens a step on each GPU")
            break
    host = _host_memory(question, plan)
    if host is not None:
        found.append(f"{host:,.0f} GiB of host memory a node")
    count = smallest_count(question, gpu, options)
    if count is not None:
        found.append(f"{count.cluster.devices:,} × {gpu.name}")
    larger = sorted((card for card in known if card.memory > gpu.memory), key=lambda card: card.memory)
    for card in larger:
        if make_plan(question, gpu_cluster(card, options)).fits:
            found.append(f"{options.devices:,} × {card.name}")
            break
    return found


def answer(
    question: Question, plan: Plan, gpu: Gpu, options: ClusterOptions, known: list[Gpu]
) -> dict[str, Any]:
    """The entry `smallest` of a plan's JSON: how few GPUs of the kind would do, and what would make a plan fit."""
    count = smallest_count(question, gpu, options)
    return {
        "gpu": gpu.kind,
        "gpus": None if count is None else count.cluster.devices,
        "bytes_per_parameter": None if count is None else count.real.tier.bytes,
        "changes": [] if plan.fits else changes(question, plan, gpu, options, known),
    }


def _on(question: Question, gpu: Gpu, options: ClusterOptions, count: int) -> Plan:
    return make_plan(question, gpu_cluster(gpu, replace(options, devices=count)))


def _with_bytes(question: Question, cluster: Cluster, bytes_: int) -> Plan:
    return make_plan(replace(question, bytes_per_parameter=bytes_), cluster)


def _host_memory(question: Question, plan: Plan) -> float | None:
    """GiB of a node that would hold what the devices cannot, rounded up to 64; None where that does not help."""
    budget, cluster = plan.real.budget, plan.cluster
    if not plan.real.tier.layerwise or budget.host <= cluster.host_memory:
        return None
    needed = budget.host * cluster.per_node / GIB
    rounded = -(-needed // 64) * 64
    roomy = replace(cluster, host_memory=rounded * GIB / cluster.per_node)
    return rounded if make_plan(question, roomy).fits else None


def check_bytes(bytes_: int | None) -> None:
    """Raises ConfigError for a number of bytes a parameter that no tier has."""
    if bytes_ is not None and bytes_ not in TIERS:
        raise ConfigError(
            f"no tier of {bytes_} bytes a parameter: choose {', '.join(map(str, sorted(TIERS)))}"
        )
