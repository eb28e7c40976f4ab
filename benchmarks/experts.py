"""The benchmark experts: one sparse layer, beside transformers', or one routing beside another."""

# Shapes: B rows, S tokens, D width, K experts that a token goes through

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.baseline import build_layer, missing_baseline
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
        typer.Option("--compare", help="Top-k beside prototypes and shared experts, without the baseline."),
    ] = False,
) -> dict[str, Any]:
    """One sparse layer, forward and backward, and how much of it is matrix products.

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
    """Random tokens of a step.  # B S D"""
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
    note = "left out, as asked" if baseline == "none" else missing_baseline()
    if note is None:
        candidates["baseline"], candidates["baseline products"] = _baseline_layer(sizes, x)
        note = "Qwen3MoeSparseMoeBlock with grouped_mm experts"
    report["baseline_note"] = note
    alternate(candidates, 20, 3, report.deadline, x.device, timings)


def _baseline_layer(sizes: Sizes, x: Tensor) -> tuple[Part, Part]:
    """A pass of the baseline's layer, and of its bare products."""
    layer = build_layer(sizes, x.device)
    up, down = layer.experts.gate_up_proj.transpose(1, 2), layer.experts.down_proj.transpose(1, 2)
    config = sizes.backbone.experts
    assert config is not None
    whole = backward_of(as_trained(layer.forward, x), x, [*layer.parameters()])
    return whole, products_of(up, down, sizes.tokens * config.experts_per_token)


REFERENCE = "top_k"


def routings(config: ExpertsConfig) -> dict[str, ExpertsConfig]:
    """The ways, by name: K of all experts, one in each of K prototypes, both with half of the K shared by all tokens.

    Every token goes through K experts of the same size in each, so products and active weights are equal; what differs
    is the choice, and how rows lie. Shared experts are one dense network of K/2 times the size; an odd K has one more
    that is chosen. One prototype alone is top-1, and left out.
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
    """Times a layer of each way in turn on x (B S D) and fills the report's `routings` and `over_top_k`."""
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
        "one layer, forward and backward; equal active weights; routing: all but the chosen experts' products, and so "
        "with what shared experts take; over_top_k: tokens a second, where top_k is 1"
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
