"""Ways of choosing experts beside one another, each with as many active weights: `benchmarks experts --compare`."""

# Letters: B rows, S tokens, D width, K experts that a token goes through

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.contender import Part
from benchmarks.layer import layer_figures, our_layer
from benchmarks.measure import Timing, alternate
from benchmarks.report import Report
from benchmarks.sizes import Sizes
from openm6.nn.config import ExpertsConfig

REFERENCE = "top_k"


def routings(config: ExpertsConfig) -> dict[str, ExpertsConfig]:
    """The ways, by name: K of all experts, one in each of K prototypes, both with half of the K shared by all tokens.

    Every token goes through K experts of the same size in each, so products and active weights are equal; what differs
    is the choice, and how rows lie. Shared experts are one dense network of K/2 times the size; an odd K has one more
    that is chosen. One prototype alone is top-1, and left out.
    """
    count, experts = config.choices, config.num_experts
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
    contenders: dict[str, Part] = {}
    config = sizes.backbone.experts
    assert config is not None

    def figures() -> dict[str, Any]:
        return {
            name: layer_figures(timings[name], timings[f"{name} products"], contenders[name], sizes, x.device)
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
        contenders[name], contenders[f"{name} products"] = our_layer(way, x)
    alternate(contenders, 20, 3, report.deadline, x.device, timings)


def _over_reference(report: Report) -> dict[str, float] | None:
    found = report.found["routings"]
    if REFERENCE not in found:
        return None
    reference = found[REFERENCE]["tokens_per_second"]
    return {name: round(row["tokens_per_second"] / reference, 3) for name, row in found.items()}
