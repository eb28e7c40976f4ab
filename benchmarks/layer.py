"""One sparse layer of ours as a thing to be timed, and what its timings say."""

# Letters: B rows, S tokens, D width

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contender import Part, backward_of, own_products_of
from benchmarks.measure import Timing
from benchmarks.sizes import Sizes, peak_tflops
from openm6.nn.config import ExpertsConfig
from openm6.nn.exchange import LocalExchange
from openm6.nn.experts import Experts, Router


def our_layer(config: ExpertsConfig, x: Tensor) -> tuple[Part, Part]:
    """A forward and backward pass of a sparse layer on x (B S D), and of its bare products with even loads."""
    width = x.shape[-1]
    with x.device:
        experts, router = Experts(width, config), Router(width, config)
    experts.reset_parameters(0.02, 0.02)
    router.reset_parameters(0.02)
    experts, router = experts.to(x.dtype), router.to(x.dtype)
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

    def forward(leaf: Tensor) -> Tensor:
        return experts(leaf, router, valid, LocalExchange(), 0)[0]

    layer = backward_of(as_trained(forward, x), x, [*experts.parameters(), router.weight])
    return layer, own_products_of(experts.up, experts.down, x.shape[0] * x.shape[1] * config.choices)


def as_trained(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Compiled on a GPU, as training is."""
    compiled: Callable[[Tensor], Tensor] = torch.compile(forward) if x.is_cuda else forward
    return compiled


def layer_figures(
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
