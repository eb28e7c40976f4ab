"""Benchmark `fp8`: accuracy of 8-bit expert products, and their speed on a Hopper GPU."""

# Shapes: B rows, S tokens of a row, R rows sent to experts, K and N widths, E experts

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.candidate import Part, products_of
from benchmarks.decoder import Decoder, our_candidate
from benchmarks.harness import Json, Report, SizesName, TimeLimit, Timing, alternate, device_name
from benchmarks.sizes import Sizes, choose_sizes, default_name
from openm6.core.device import resolve_device
from openm6.data.media import load_table
from openm6.data.parquet import embedded_path
from openm6.nn.layers import MLP, activate
from openm6.nn.moe import Experts, MoE, Routing, TokenDispatcher
from openm6.ops.moe import dropless_permutation, permute, unpermute
from openm6.ops.sequence import causal_meta
from openm6.optim.config import OptimizerConfig
from openm6.optim.registry import build_optimizer, default_groups

EIGHT_BITS = torch.float8_e4m3fn
LARGEST = torch.finfo(EIGHT_BITS).max


def on_hopper(device: torch.device) -> bool:
    """Return whether torch's scaled grouped product with a scale per row runs here: compute capability 9.0 only."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values in 8 bits, and one scale per row.  # … K -> … K, …"""
    scale = (x.abs().amax(-1).float() / LARGEST).clamp(min=1e-12)
    return (x.float() / scale.unsqueeze(-1)).to(EIGHT_BITS), scale


@functools.cache
def compiled_quantise() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return `quantise` compiled to one kernel, for a GPU."""
    return torch.compile(quantise)


def rounded(x: Tensor, block: int | None = None) -> Tensor:
    """Return x rounded to 8 bits, with a scale per row or per block of a row.  # … K -> … K"""
    parts = x if block is None else x.unflatten(-1, (-1, block))
    small, scale = quantise(parts)
    return (small.float() * scale.unsqueeze(-1)).to(x.dtype).view(x.shape)


def scaled_product(rows: Tensor, weight: Tensor, counts: Tensor, block: int | None = None) -> Tensor:
    """Return `grouped_mm` with both operands in 8 bits.  # R K, E K N, E -> R N"""
    if block is None and on_hopper(rows.device):
        return _kernel(rows, weight, counts)
    return scaled_product_reference(rows, weight, counts, block)


def scaled_product_reference(rows: Tensor, weight: Tensor, counts: Tensor, block: int | None = None) -> Tensor:
    """Return the reference: both operands rounded to 8 bits, multiplied in their own dtype."""
    small = rounded(weight.mT.contiguous(), block).mT
    return grouped_product(rounded(rows, block), small, counts)


def grouped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return a product for each expert.  # R K, E K N, E -> R N"""
    groups = rows.split(counts.tolist())
    return torch.cat([group @ matrix for group, matrix in zip(groups, weight, strict=True)])


def _kernel(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    fused = compiled_quantise()
    left, left_scale = fused(rows.contiguous())
    right, right_scale = fused(weight.mT.contiguous())  # E N K: the kernel wants K to lie together
    ends = counts.cumsum(0).to(torch.int32)
    product: Tensor = torch._scaled_grouped_mm(
        left, right.mT, left_scale, right_scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product


class _Product(torch.autograd.Function):
    """y = x·W and dx = dy·Wᵀ in 8 bits; dW = xᵀ·dy in bf16, because its sums are over few and uneven rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, counts)
        return scaled_product(rows, weight, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, counts = ctx.saved_tensors
        d_rows = scaled_product(gradient, weight.mT, counts)
        ends = counts.cumsum(0).to(torch.int32)
        d_weight = F.grouped_mm(rows.t(), gradient, offs=ends)  # R K, R N -> E K N
        return d_rows, d_weight, None


def eight_bit_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return `scaled_product` with a gradient, for training.  # R K, E K N, E -> R N"""
    product: Tensor = _Product.apply(rows, weight, counts)
    return product


class EightBitExperts(Experts):
    """A sparse layer with both products in 8 bits, in one process and without a capacity."""

    def forward(
        self, x: Tensor, routing: Routing, valid: Tensor, dispatcher: TokenDispatcher, shared: MLP | None
    ) -> tuple[Tensor, Tensor | None]:
        flat = x.flatten(0, 1)
        plan = dropless_permutation(routing.chosen, self.config.num_experts)
        hidden = activate(eight_bit_product(permute(flat, plan), self.up, plan.counts), self.config.hidden_act)
        rows = eight_bit_product(hidden, self.down, plan.counts)
        return unpermute(rows, routing.gate, plan).view_as(x), None


WORTH = {"gain": 0.15, "loss_difference": 0.01}  # required to become an option of training
BLOCK = 128
NO_HOPPER = (
    "torch's grouped product of 8-bit numbers needs a Hopper GPU (compute capability 9.0): only errors are measured, "
    "with the reference implementation"
)
LOSS_STEPS = {"cpu": 80, "cuda": 600}
BYTES = 256  # vocabulary of the loss runs: texts as bytes
LOSS_SIZES = {
    "cpu": Sizes(
        num_layers=2, width=128, num_heads=2, num_kv_heads=1, head_dim=64,
        num_experts=8, top_k=2, hidden=128, vocabulary=BYTES, rows=4, length=128,
    ),
    "cuda": Sizes(
        num_layers=8, width=512, num_heads=8, num_kv_heads=2, head_dim=64,
        num_experts=16, top_k=2, hidden=512, vocabulary=BYTES, rows=16, length=1024,
    ),
}  # fmt: skip


def bench_fp8(
    config: SizesName = None,
    seconds: TimeLimit = None,
    json_path: Json = None,
) -> dict[str, Any]:
    """Measure expert products in 8 bits: rounding error and loss, and on a Hopper GPU the time.

    \b
    Example: python -m benchmarks fp8 --config a --json fp8.json
    """
    device = resolve_device()
    sizes, name = choose_sizes(config, device), config or default_name(device)
    with Report(json_path, seconds or (300.0 if device.type == "cuda" else 90.0)) as report:
        report.update({"device": device_name(device), "torch": torch.__version__, "worth_it_at": WORTH})
        report["config"] = {"name": name, **sizes.model_dump()}
        report["error"] = product_errors(sizes)
        if on_hopper(device):
            speed: dict[str, Any] = {}
            report.update({"speed": speed, "speed_note": None})
            measure_speed(speed, sizes, device, report)
        else:
            report.update({"speed": None, "speed_note": NO_HOPPER})
        compare_losses(report, device)
    return report.found


def product_errors(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Return the relative error (Frobenius) of the first product and of its input gradient, by granularity of scales.

    Few experts at the given sizes; inputs and weights are normal, a few columns of the input 20 times as large, as in
    trained models.
    """
    generator = torch.Generator().manual_seed(0)
    experts, rows = 2, 64
    x = torch.randn(experts * rows, sizes.width, generator=generator)  # R K
    x[:, :: max(1, sizes.width // 4)] *= 20
    weight = 0.02 * torch.randn(experts, sizes.width, 2 * sizes.hidden, generator=generator)  # E K N
    upstream = torch.randn(experts * rows, 2 * sizes.hidden, generator=generator)  # R N
    counts = torch.full((experts,), rows)
    found = {}
    for name, block in (("a scale per row", None), (f"a scale per {BLOCK} numbers of a row", BLOCK)):
        if block and (sizes.width % block or 2 * sizes.hidden % block):
            continue
        found[name] = {
            "product": _error(x, weight, counts, block),
            "gradient": _error(upstream, weight.mT, counts, block),
        }
    return found


def _error(rows: Tensor, weight: Tensor, counts: Tensor, block: int | None) -> float:
    exact = grouped_product(rows.double(), weight.double(), counts)
    found = scaled_product_reference(rows, weight, counts, block)
    return round(float((found - exact).norm() / exact.norm()), 5)


def measure_speed(found: dict[str, Any], sizes: Sizes, device: torch.device, report: Report) -> None:
    """Measure a layer's products in bf16 and in 8 bits, quantization included; estimate the gain of a step."""
    layers = sizes.num_layers
    timings = _time_products(sizes, device, report)
    found["layer_ms"] = {name: round(1000 * timing.median, 3) for name, timing in timings.items()}
    torch.cuda.empty_cache()
    candidate = our_candidate(sizes, device)
    step = alternate({"step": candidate.step}, 8, 3, report.deadline, device)["step"].median
    saved = layers * (timings["bf16"].median - timings["fp8"].median)
    found["step_ms"] = round(1000 * step, 3)
    found["fraction_of_products"] = round(layers * timings["bf16"].median / step, 4)
    found["estimated_gain"] = round(step / (step - saved) - 1, 4)


def _time_products(sizes: Sizes, device: torch.device, report: Report) -> dict[str, Timing]:
    """Return products of one layer and their gradients in both precisions, and the quantization of its weights."""
    with device:
        up = torch.randn(sizes.num_experts, sizes.width, 2 * sizes.hidden, dtype=torch.bfloat16)
        down = torch.randn(sizes.num_experts, sizes.hidden, sizes.width, dtype=torch.bfloat16)
    for weight in (up, down):
        weight.mul_(0.02).requires_grad_()
    num_rows, fused = sizes.tokens * sizes.top_k, compiled_quantise()

    def quantise_weights() -> None:
        with torch.no_grad():
            for weight in (up, down):
                for one in (weight, weight.mT.contiguous()):
                    fused(one)

    candidates: dict[str, Part] = {
        "bf16": products_of(up, down, num_rows),
        "fp8": products_of(up, down, num_rows, eight_bit_product),
        "quantising weights": quantise_weights,
    }
    return alternate(candidates, 20, 3, report.deadline, device)


def compare_losses(report: Report, device: torch.device) -> None:
    """Train one small decoder on the bytes of embedded texts with and without 8 bits, on the same batches."""
    sizes, steps = LOSS_SIZES[device.type], LOSS_STEPS[device.type]
    losses: dict[str, list[float]] = {"plain": [], "fp8": []}
    report.later("loss", partial(_loss_figures, losses))
    text = _bytes_of_texts()
    meta = causal_meta(sizes.rows, sizes.length, device=device)
    runs = {name: _decoder(sizes, device, name == "fp8") for name in losses}
    generator = np.random.default_rng(0)
    for _ in range(steps):
        if report.deadline.passed:
            break
        starts = generator.integers(0, len(text) - sizes.length, sizes.rows)
        ids = torch.from_numpy(np.stack([text[start : start + sizes.length] for start in starts])).to(device)
        for name, (model, optimizer) in runs.items():
            loss = model(ids, meta)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[name].append(float(loss.detach()))


def _bytes_of_texts() -> np.ndarray:
    texts = load_table(embedded_path("wordnet_en-train"), ["text_en"]).column("text_en")
    joined = "\n".join(text or "" for text in texts).encode()
    return np.frombuffer(joined, np.uint8).astype(np.int64)


def _decoder(sizes: Sizes, device: torch.device, eight_bits: bool) -> tuple[Decoder, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Decoder(sizes)
    if eight_bits:
        for block in model.backbone.blocks:
            assert isinstance(block.mlp, MoE)
            experts = EightBitExperts(sizes.width, block.mlp.experts.config)
            experts.load_state_dict(block.mlp.experts.state_dict())
            block.mlp.experts = experts
    model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    settings = OptimizerConfig(name="adamw", learning_rate=2e-3)
    return model, build_optimizer(default_groups(model), settings)


def _loss_figures(losses: dict[str, list[float]]) -> dict[str, Any] | None:
    """Return mean losses over the last quarter of the common steps, and their relative difference."""
    steps = min(len(taken) for taken in losses.values())
    if not steps:
        return None
    last = {name: statistics.mean(taken[steps - max(1, steps // 4) : steps]) for name, taken in losses.items()}
    return {
        "steps": steps,
        **{name: round(value, 5) for name, value in last.items()},
        "relative_difference": round(last["fp8"] / last["plain"] - 1, 5),
    }
