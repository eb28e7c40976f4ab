"""`openm6 bench experts`: one sparse layer, forward and backward, beside the peer's layer of the same sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openm6.base.errors import ConfigError
from openm6.bench.contender import Part, backward_of, products_of
from openm6.bench.measure import Deadline, Timing, alternate, device_name, emit
from openm6.bench.peer import build_layer, missing_peer
from openm6.bench.sizes import Sizes, choose_sizes, default_name, peak_tflops
from openm6.nn.exchange import LocalExchange
from openm6.nn.experts import Experts, Router

PEERS = ("transformers", "none")


def bench_experts(config: str | None, peer: str, seconds: float | None, json: Path | None) -> dict[str, Any]:
    """Measures both layers in turn, and the bare products, and prints the comparison as JSON.

    config: "a", "fine" or "cpu"; None: the one that fits the device. seconds: after these it prints what it has.

    Raises:
        ConfigError: no such config or peer.
    """
    if peer not in PEERS:
        raise ConfigError(f"no peer {peer!r}: choose {' or '.join(PEERS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, name = choose_sizes(config, device), config or default_name(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    x = torch.randn(sizes.rows, sizes.length, sizes.width, device=device, dtype=dtype)
    layer, products = our_layer(sizes, x)
    contenders: dict[str, Part] = {"products": products, "ours": layer}
    note = "left out, as asked" if peer == "none" else missing_peer()
    if note is None:
        contenders["peer"] = _peer_layer(sizes, x)
        note = "Qwen3MoeSparseMoeBlock with grouped_mm experts"
    deadline = Deadline(seconds or 60.0)
    timings = alternate(contenders, 20, 3, deadline, device)
    found = {
        who: _figures(timings[who], timings["products"], contenders[who], sizes, device)
        for who in ("ours", "peer")
        if who in timings
    }
    ours, theirs = found["ours"], found.get("peer")
    result = {
        "ours": ours,
        "peer": theirs,
        "ratio": round(ours["tokens_per_second"] / theirs["tokens_per_second"], 3) if theirs else None,
        "device": device_name(device),
        "config": {"name": name, **sizes.model_dump()},
        "peer_note": note,
        "torch": torch.__version__,
    }
    emit(result, json)
    return result


def our_layer(sizes: Sizes, x: Tensor) -> tuple[Part, Part]:
    """A forward and backward pass of our sparse layer on x, and of its bare products with even loads."""
    config = sizes.backbone.experts
    assert config is not None
    with x.device:
        experts, router = Experts(sizes.width, config), Router(sizes.width, config)
    experts.reset_parameters(0.02, 0.02)
    router.reset_parameters(0.02)
    experts, router = experts.to(x.dtype), router.to(x.dtype)
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

    def forward(leaf: Tensor) -> Tensor:
        return experts(leaf, router, valid, LocalExchange(), 0)[0]

    parameters = [experts.up, experts.down, router.weight]
    layer = backward_of(_ready(forward, x), x, parameters)
    return layer, products_of(experts.up, experts.down, sizes.tokens * sizes.top_k)


def _peer_layer(sizes: Sizes, x: Tensor) -> Part:
    layer = build_layer(sizes, x.device)
    return backward_of(_ready(layer.forward, x), x, [*layer.parameters()])


def _ready(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Compiled on a GPU, as training is."""
    compiled: Callable[[Tensor], Tensor] = torch.compile(forward) if x.is_cuda else forward
    return compiled


def _figures(
    timing: Timing, products: Timing, call: Part, sizes: Sizes, device: torch.device
) -> dict[str, Any]:
    """The figures of one layer; routing is all that it does beside its products."""
    tflops, peak = sizes.expert_flops / timing.median / 1e12, peak_tflops(device)
    bare = 1000 * products.median
    return {
        "tokens_per_second": round(sizes.tokens / timing.median, 1),
        "mfu": None if peak is None else round(tflops / peak, 4),
        "tflops": round(tflops, 4),
        "peak_memory_gib": _peak_memory(call, device),
        "breakdown_ms": {
            "expert_products": round(bare, 3),
            "routing": round(1000 * timing.median - bare, 3),
        },
        "layer_seconds": timing.summary(),
    }


def _peak_memory(call: Part, device: torch.device) -> float | None:
    """GiB that a pass takes beyond what lies there before it."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**30, 3)
