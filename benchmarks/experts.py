"""Benchmark `experts`: one sparse layer, compared with that of `transformers`, or routing methods compared."""

# Shapes: B rows, S tokens, D width, K experts that a token goes through

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.baseline import build_layer, choose_experts, missing_baseline
from benchmarks.candidate import Part, backward_of, products_of
from benchmarks.decoder import as_trained, layer_figures, our_layer
from benchmarks.harness import (
    Baseline,
    Json,
    Report,
    SizesName,
    TimeLimit,
    Timing,
    alternate,
    device_name,
    speed_ratio,
)
from benchmarks.sizes import Sizes, check_baseline, choose_sizes, default_name
from openm6.core.device import resolve_device
from openm6.nn.config import ExpertsConfig


def bench_experts(
    config: SizesName = None,
    baseline: Baseline = "transformers",
    seconds: TimeLimit = None,
    json_path: Json = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare top-k, prototypes and shared experts instead."),
    ] = False,
) -> dict[str, Any]:
    """Measure one sparse layer, forward and backward, and the time of its matrix products.

    \b
    Example: python -m benchmarks experts --config fine --json experts.json
    """
    check_baseline(baseline)
    device = resolve_device()
    sizes, name = choose_sizes(config, device), config or default_name(device)
    with Report(json_path, seconds or 60.0) as report:
        report.update(
            {
                "device": device_name(device),
                "config": {"name": name, **sizes.model_dump()},
                "torch": torch.__version__,
            }
        )
        if compare:
            compare_routings(report, sizes, _input(sizes, device))
        else:
            _compare_with_baseline(report, sizes, baseline, _input(sizes, device))
    return report.found


def _input(sizes: Sizes, device: torch.device) -> Tensor:
    """Return random tokens of a step.  # B S D"""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.randn(sizes.rows, sizes.length, sizes.width, device=device, dtype=dtype)


def _compare_with_baseline(report: Report, sizes: Sizes, baseline: str, x: Tensor) -> None:
    timings: dict[str, Timing] = {}
    candidates: dict[str, Part] = {}

    def figures(who: str) -> dict[str, Any] | None:
        found = timings.get(f"{who} products")
        if found is None or not found.seconds:
            return None
        return layer_figures(timings[who], found, candidates[who], sizes, x.device)

    for who in ("ours", "baseline"):
        report.later(who, partial(figures, who))
    report.later("ratio", lambda: speed_ratio(report.found["ours"], report.found["baseline"]))
    config = sizes.backbone.experts
    assert config is not None
    candidates["ours"], candidates["ours products"] = our_layer(config, x)
    note = "disabled by --baseline none" if baseline == "none" else missing_baseline()
    if note is None:
        report["baseline_experts"] = chosen = choose_experts(sizes, x.device)
        experts = chosen["experts_implementation"]
        candidates["baseline"], candidates["baseline products"] = _baseline_layer(sizes, x, experts)
        note = f"Qwen3MoeSparseMoeBlock of {chosen['version']} with {experts} experts, its fastest here"
    report["baseline_note"] = note
    alternate(candidates, 20, 3, report.deadline, x.device, timings)


def _baseline_layer(sizes: Sizes, x: Tensor, experts: str) -> tuple[Part, Part]:
    """Return a pass of the baseline's layer, and of its products alone."""
    layer = build_layer(sizes, x.device, experts)
    up, down = layer.experts.gate_up_proj.transpose(1, 2), layer.experts.down_proj.transpose(1, 2)
    config = sizes.backbone.experts
    assert config is not None
    whole = backward_of(as_trained(layer.forward, x), x, [*layer.parameters()])
    return whole, products_of(up, down, sizes.tokens * config.experts_per_token)


REFERENCE = "top_k"


def routings(config: ExpertsConfig) -> dict[str, ExpertsConfig]:
    """Return the methods by name: top-K, one in each of K prototypes, and both with half of the K shared by all tokens.

    In each, a token goes through K experts of the same size, so products and active weights are equal; the routing and
    the order of rows differ. Shared experts are one dense network of K/2 times the size; an odd K routes one more. One
    prototype is top-1 and left out.
    """
    count, experts = config.experts_per_token, config.num_experts
    chosen, shared = count - count // 2, count // 2
    ways: dict[str, dict[str, int | None]] = {
        REFERENCE: {"top_k": count},
        "prototypes": {"top_k": None, "num_prototypes": count},
    }
    if shared:
        ways["top_k_shared"] = {"top_k": chosen, "num_shared": shared}
    if shared and chosen > 1:
        ways["prototypes_shared"] = {"top_k": None, "num_prototypes": chosen, "num_shared": shared}
    return {
        name: config.model_copy(update=way)
        for name, way in ways.items()
        if experts % (way.get("num_prototypes") or 1) == 0
    }


def compare_routings(report: Report, sizes: Sizes, x: Tensor) -> None:
    """Time a layer of each method in turn on x (B S D); set `routings` and `over_top_k` of the report."""
    timings: dict[str, Timing] = {}
    candidates: dict[str, Part] = {}
    config = sizes.backbone.experts
    assert config is not None

    def figures() -> dict[str, Any]:
        return {
            name: layer_figures(timings[name], timings[f"{name} products"], candidates[name], sizes, x.device)
            | {"experts": way.model_dump(include={"top_k", "num_prototypes", "num_shared"})}
            for name, way in ways.items()
            if timings[name].seconds and timings[f"{name} products"].seconds
        }

    ways = routings(config)
    report.later("routings", figures)
    report.later("over_top_k", partial(_over_reference, report))
    report["note"] = (
        "one layer, forward and backward; equal active weights; routing: everything but the products of the routed "
        "experts, shared experts included; over_top_k: tokens per second relative to top_k"
    )
    timings |= {f"{name}{part}": Timing() for name in ways for part in ("", " products")}
    for name, way in ways.items():
        candidates[name], candidates[f"{name} products"] = our_layer(way, x)
    alternate(candidates, 20, 3, report.deadline, x.device, timings)


def _over_reference(report: Report) -> dict[str, float] | None:
    found = report.found["routings"]
    if REFERENCE not in found:
        return None
    reference = found[REFERENCE]["tokens_per_second"]
    return {name: round(row["tokens_per_second"] / reference, 3) for name, row in found.items()}
