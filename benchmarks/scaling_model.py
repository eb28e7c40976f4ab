"""The step of a large model on up to hundreds of GPUs, from rates of the planner's table of GPUs and its links."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openm6.plan.cluster import ALL_TO_ALL, ClusterOptions, gpu_cluster

from openm6.models.config import BackboneConfig, count_parameters
from openm6.plan.hardware import gpu

SIZES = (1, 8, 16, 64, 128, 512)


@dataclass(frozen=True)
class Links:
    """Rates of one GPU as they are reached: operations a second by kind of layer, and bytes sent a second within a
    machine and between machines; and where they come from."""

    dense: float
    experts: float
    inside: float
    between: float
    gpus_a_machine: int
    sources: tuple[str, ...] = ()


def links_of(kind: str) -> Links:
    """Of a GPU in the planner's table: its best product as measured, its links as declared, and the shares of both
    that the planner takes to be reached.

    Raises:
        ConfigError: no such GPU.
    """
    entry = gpu(kind)
    cluster = gpu_cluster(entry, ClusterOptions(devices=max(SIZES)))
    product = entry.measured or entry.rate
    known = "measured" if entry.measured else "specified"
    sources = (
        f"{entry.name}: best product {product / 1e12:.0f} TFLOP/s ({known}), links {entry.peer_link / 1e9:.0f} GB/s "
        f"within a machine and {entry.network / 1e9:.0f} GB/s between them (declared); {entry.source}",
        f"reached in dense layers {cluster.dense_rate / 1e12:.0f} and in expert layers "
        f"{cluster.expert_rate / 1e12:.0f} TFLOP/s, and {ALL_TO_ALL:.0%} of the links (assumed, as by openm6 plan)",
    )
    return Links(
        cluster.dense_rate,
        cluster.expert_rate,
        cluster.peer_link,
        cluster.network,
        cluster.per_node,
        sources,
    )


def model_step(config: BackboneConfig, ranks: int, links: Links, tokens: int = 4096) -> dict[str, Any]:
    """Seconds of a step in which every rank has `tokens` tokens, by part, and which of them binds.

    Experts are dealt out to all ranks, what is dense is cut over them. Rows and answers travel forwards and backwards
    in two bytes a number; overlapped with computing the longer of the two counts, else their sum.
    """
    count = count_parameters(config)
    dense = count.total - _expert_parameters(config)
    compute = 6 * tokens * (dense / links.dense + (count.active - dense) / links.experts)
    parts = {
        "compute": compute,
        "exchange": _exchange(config, ranks, links, tokens),
        "dense weights": _dense_weights(dense, ranks, links),
    }
    step = max(compute, parts["exchange"] + parts["dense weights"])
    return {
        "gpus": ranks,
        "parameters_per_gpu": count.total / ranks,
        "seconds": parts,
        "seconds_per_step_overlapped": step,
        "seconds_per_step_in_turn": sum(parts.values()),
        "tokens_per_second_overlapped": tokens * ranks / step,
        "binds": max(parts, key=lambda name: parts[name]),
    }


def _exchange(config: BackboneConfig, ranks: int, links: Links, tokens: int) -> float:
    """Seconds for rows there and answers home, forwards and backwards."""
    experts = config.experts
    if experts is None:
        return 0.0
    layers = sum(config.has_experts(layer) for layer in range(config.num_layers))
    rows = tokens * experts.choices * (experts.capacity or 1.0)
    sent = 4 * layers * rows * config.width * 2
    machine = min(links.gpus_a_machine, ranks)
    inside, away = (machine - 1) / ranks, (ranks - machine) / ranks
    return sent * (inside / links.inside + away / links.between)


def _dense_weights(dense: int, ranks: int, links: Links) -> float:
    """Seconds to gather them forwards and backwards in two bytes, and to sum their gradients in four."""
    slowest = links.inside if ranks <= links.gpus_a_machine else links.between
    return dense * (2 + 2 + 4) * (1 - 1 / ranks) / slowest


def _expert_parameters(config: BackboneConfig) -> int:
    experts = config.experts
    if experts is None:
        return 0
    matrices = 3 if experts.ffn == "swiglu" else 2
    layers = len({config.weight_sets[n] for n in range(config.num_layers) if config.has_experts(n)})
    return layers * experts.num_experts * matrices * config.width * experts.hidden
