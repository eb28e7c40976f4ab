"""The benchmark experts: one sparse layer, forward and backward, beside the peer's, or one routing beside another."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contender import Part, backward_of, products_of
from benchmarks.layer import as_trained, layer_figures, our_layer
from benchmarks.measure import Timing, alternate, device_name, speed_ratio
from benchmarks.peer import build_layer, missing_peer
from benchmarks.report import Report
from benchmarks.routings import compare_routings
from benchmarks.sizes import Sizes, choose_sizes, default_name
from openm6.base.device import own_device
from openm6.base.errors import ConfigError

PEERS = ("transformers", "none")


def bench_experts(
    config: str | None, peer: str, seconds: float | None, json: Path | None, compare: bool = False
) -> dict[str, Any]:
    """Measures both layers in turn, and the bare products, and prints the comparison as JSON.

    config: "a", "fine" or "cpu"; None: the one that fits the device. seconds: after these it prints what it has;
    compare: instead of the peer, our ways of choosing experts beside one another.

    Raises:
        ConfigError: no such config or peer.
    """
    if peer not in PEERS:
        raise ConfigError(f"no peer {peer!r}: choose {' or '.join(PEERS)}")
    device = own_device()
    sizes, name = choose_sizes(config, device), config or default_name(device)
    with Report(json, seconds or 60.0) as report:
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
            _compare_with_peer(report, sizes, peer, _input(sizes, device))
    return report.found


def _input(sizes: Sizes, device: torch.device) -> Tensor:
    """Random tokens of a step.  # B S D"""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.randn(sizes.rows, sizes.length, sizes.width, device=device, dtype=dtype)


def _compare_with_peer(report: Report, sizes: Sizes, peer: str, x: Tensor) -> None:
    timings: dict[str, Timing] = {}
    contenders: dict[str, Part] = {}

    def figures(who: str) -> dict[str, Any] | None:
        found = timings.get(f"{who} products")
        if found is None or not found.seconds:
            return None
        return layer_figures(timings[who], found, contenders[who], sizes, x.device)

    for who in ("ours", "peer"):
        report.later(who, partial(figures, who))
    report.later("ratio", lambda: speed_ratio(report.found["ours"], report.found["peer"]))
    config = sizes.backbone.experts
    assert config is not None
    contenders["ours"], contenders["ours products"] = our_layer(config, x)
    note = "left out, as asked" if peer == "none" else missing_peer()
    if note is None:
        contenders["peer"], contenders["peer products"] = _peer_layer(sizes, x)
        note = "Qwen3MoeSparseMoeBlock with grouped_mm experts"
    report["peer_note"] = note
    alternate(contenders, 20, 3, report.deadline, x.device, timings)


def _peer_layer(sizes: Sizes, x: Tensor) -> tuple[Part, Part]:
    """A pass of the peer's layer, and of its bare products."""
    layer = build_layer(sizes, x.device)
    up, down = layer.experts.gate_up_proj.transpose(1, 2), layer.experts.down_proj.transpose(1, 2)
    config = sizes.backbone.experts
    assert config is not None
    whole = backward_of(as_trained(layer.forward, x), x, [*layer.parameters()])
    return whole, products_of(up, down, sizes.tokens * config.choices)
