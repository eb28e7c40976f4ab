"""Benchmark `train`: tokens per second of a training step, compared with Qwen3-MoE of `transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks.baseline import (
    EXPERT_LIBRARIES,
    baseline_candidate,
    baseline_variants,
    choose_experts,
    missing_baseline,
)
from benchmarks.candidate import Candidate, take_turns, time_parts
from benchmarks.decoder import our_candidate
from benchmarks.harness import Baseline, Deadline, Json, Report, SizesName, TimeLimit, Timing, device_name, speed_ratio
from benchmarks.per_core import Steps, ratio, time_per_core, variation
from benchmarks.sizes import Sizes, check_baseline, choose_sizes, default_name, peak_tflops
from openm6.core.device import keep_freed_memory, resolve_device
from openm6.core.errors import ConfigError
from openm6.ops.matmul import has_bf16, onednn_is_faster

Precision = Annotated[
    str, typer.Option("--precision", metavar="auto|fp32|bf16", help="Of products on a CPU; auto: all it has.")
]
ROUNDS = 40  # of each core, unless the time is over
PARTS_FRACTION = 0.8  # of the time left, for whole steps; the rest is for their parts


def bench_train(
    config: SizesName = None,
    baseline: Baseline = "transformers",
    seconds: TimeLimit = None,
    json_path: Json = None,
    precision: Precision = "auto",
) -> dict[str, Any]:
    """Measure a whole training step and its parts, compared with Qwen3-MoE of `transformers`.

    On a CPU each core runs a process of one thread; there is no ratio if the times vary too much.

    \b
    Example: python -m benchmarks train --config a --json train.json
    """
    check_baseline(baseline)
    device = resolve_device()
    sizes, name = choose_sizes(config, device), config or default_name(device)
    on_gpu = device.type == "cuda"
    precisions = [] if on_gpu else _precisions(precision)
    with Report(json_path, seconds or (360.0 if on_gpu else 240.0)) as report:
        report.update({"device": device_name(device), "config": {"name": name, **sizes.model_dump()}})
        report["torch"] = torch.__version__
        if on_gpu:
            _on_gpu(report, sizes, device, baseline)
        else:
            _on_cores(report, sizes, baseline, precisions)
    return report.found


def _precisions(precision: str) -> list[str]:
    """Return what a CPU is to be measured in."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"no precision {precision!r}: choose auto, fp32 or bf16")
    return ["fp32", *(["bf16"] if has_bf16() else [])] if precision == "auto" else [precision]


def _on_gpu(report: Report, sizes: Sizes, device: torch.device, baseline: str) -> None:
    candidates: dict[str, Candidate] = {}
    parts: dict[str, dict[str, float]] = {}
    for who in ("ours", "baseline"):
        report.later(who, partial(_figures, who, candidates, parts, sizes, device))
    report.later("ratio", lambda: speed_ratio(report.found["ours"], report.found["baseline"]))
    experts = _choose_baseline(report, sizes, device, baseline)
    theirs = EXPERT_LIBRARIES.get(experts or "", "cuBLAS")
    report["libraries"] = {"ours": "cuBLAS, experts CUTLASS", "baseline": f"cuBLAS, experts {theirs}"}
    _open_candidates(candidates, sizes, device, experts)
    take_turns(candidates, device, 4, 8, report.deadline)
    for who, candidate in candidates.items():
        parts[who] = time_parts(candidate, device, report.deadline)


def _on_cores(report: Report, sizes: Sizes, baseline: str, precisions: list[str]) -> None:
    """Measure each precision for an equal part of the time, then the parts of a step in fp32 in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    experts = _choose_baseline(report, sizes, torch.device("cpu"), baseline)
    # Of fp32; in bf16 torch itself calls oneDNN.
    usual = "MKL" if torch.backends.mkl.is_available() else "the BLAS of this torch"
    report["libraries"] = {"ours": "oneDNN" if onednn_is_faster() else usual, "baseline": usual}
    timings: dict[str, dict[str, Timing]] = {precision: {} for precision in precisions}
    for precision in precisions:
        report.later(precision, partial(_compared, timings[precision], sizes))
    breakdown: dict[str, dict[str, float]] = {}
    report["breakdown_ms"] = breakdown
    for left, precision in zip(range(len(precisions), 0, -1), precisions, strict=True):
        part = Deadline(report.deadline.left * PARTS_FRACTION / left)
        report["cores"] = time_per_core(open_steps, (sizes, precision, experts), ROUNDS, part, timings[precision])
    try:
        candidates: dict[str, Candidate] = {}
        _open_candidates(candidates, sizes, torch.device("cpu"), experts)
        take_turns(candidates, torch.device("cpu"), 1, 3, report.deadline)
        for who, candidate in candidates.items():
            breakdown[who] = time_parts(candidate, torch.device("cpu"), report.deadline)
    finally:
        torch.set_num_threads(threads)


def _choose_baseline(report: Report, sizes: Sizes, device: torch.device, baseline: str) -> str | None:
    """Return the experts implementation of the baseline, with what was tried in the report; None: no baseline."""
    report["baseline_note"] = note = "disabled by --baseline none" if baseline == "none" else missing_baseline()
    if note is not None:
        return None
    report["baseline_experts"] = chosen = choose_experts(sizes, device)
    name, compiled = chosen["experts_implementation"], "compiled" if device.type == "cuda" else "not compiled"
    report["baseline_note"] = f"Qwen3-MoE of {chosen['version']}, {compiled}, {name} experts, its fastest here"
    return str(name)


def open_steps(sizes: Sizes, precision: str, experts: str | None) -> Steps:
    """Return a step of ours and, with their `experts` implementation, of each setting of the baseline, on a CPU."""
    cpu = torch.device("cpu")
    steps = {"ours": our_candidate(sizes, cpu, precision == "bf16").step}
    return {**steps, **(baseline_variants(sizes, precision, experts) if experts else {})}


def _compared(timings: Mapping[str, Timing], sizes: Sizes) -> dict[str, Any] | None:
    """Return the results of one precision per core; None if a side was not timed."""
    if not timings or not all(timing.seconds for timing in timings.values()):
        return None
    found: dict[str, Any] = {
        name: {
            "tokens_per_second_per_core": round(sizes.tokens / timing.median, 1),
            "fastest": round(sizes.tokens / min(timing.seconds), 1),
            "variation": round(variation(timing), 3),
            "step_seconds": timing.summary(),
        }
        for name, timing in timings.items()
    }
    others = [timing for name, timing in timings.items() if name != "ours"]
    if others:
        found["ratio"], found["note"] = ratio(timings["ours"], min(others, key=lambda timing: timing.median))
    return found


def _open_candidates(candidates: dict[str, Candidate], sizes: Sizes, device: torch.device, experts: str | None) -> None:
    """Add both models, on a GPU in host memory until their turn."""
    away = torch.device("cpu")
    candidates["ours"] = our_candidate(sizes, device)
    candidates["ours"].move(away)
    if experts is not None:
        candidates["baseline"] = baseline_candidate(sizes, device, experts)
        candidates["baseline"].move(away)


def _figures(
    who: str,
    candidates: Mapping[str, Candidate],
    parts: Mapping[str, dict[str, float]],
    sizes: Sizes,
    device: torch.device,
) -> dict[str, Any] | None:
    """Return the results of one candidate by their keys; None if it was not timed."""
    if who not in candidates or not candidates[who].timing.seconds:
        return None
    candidate = candidates[who]
    median = candidate.timing.median
    tflops, peak = sizes.flops / median / 1e12, peak_tflops(device)
    return {
        "tokens_per_second": round(sizes.tokens / median, 1),
        "mfu": None if peak is None else round(tflops / peak, 4),
        "tflops": round(tflops, 4),
        "peak_memory_gib": round(candidate.peak_bytes / 2**30, 2) if candidate.peak_bytes else None,
        "breakdown_ms": parts.get(who),
        "step_seconds": candidate.timing.summary(),
        "recompilations": candidate.recompiled,
        "parameters": sum(parameter.numel() for parameter in candidate.model.parameters()),
    }
