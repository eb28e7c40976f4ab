"""Benchmark `train`: tokens per second of a training step, compared with Qwen3-MoE of `transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.baseline import baseline_candidate, missing_baseline
from benchmarks.candidate import Candidate, take_turns, time_parts
from benchmarks.decoder import our_candidate
from benchmarks.harness import Baseline, Json, Report, SizesName, TimeLimit, device_name, speed_ratio
from benchmarks.sizes import Sizes, check_baseline, choose_sizes, default_name, peak_tflops
from openm6.core.device import resolve_device


def bench_train(
    config: SizesName = None,
    baseline: Baseline = "transformers",
    seconds: TimeLimit = None,
    json_path: Json = None,
) -> dict[str, Any]:
    """Measure a whole training step and its parts, compared with Qwen3-MoE of `transformers`.

    \b
    Example: python -m benchmarks train --config a --json train.json
    """
    check_baseline(baseline)
    device = resolve_device()
    sizes, name = choose_sizes(config, device), config or default_name(device)
    on_gpu = device.type == "cuda"
    candidates: dict[str, Candidate] = {}
    parts: dict[str, dict[str, float]] = {}
    turns, steps = (4, 8) if on_gpu else (3, 4)
    with Report(json_path, seconds or (360.0 if on_gpu else 120.0)) as report:
        for who in ("ours", "baseline"):
            report.later(who, partial(_figures, who, candidates, parts, sizes, device))
        report.later("ratio", lambda: speed_ratio(report.found["ours"], report.found["baseline"]))
        report.update({"device": device_name(device), "config": {"name": name, **sizes.model_dump()}})
        report["torch"] = torch.__version__
        report["baseline_note"] = _open_candidates(candidates, sizes, device, baseline)
        take_turns(candidates, device, turns, steps, report.deadline)
        for who, candidate in candidates.items():
            parts[who] = time_parts(candidate, device, report.deadline)
    return report.found


def _open_candidates(candidates: dict[str, Candidate], sizes: Sizes, device: torch.device, baseline: str) -> str:
    """Add both models, on a GPU in host memory until their turn; return a note on the baseline."""
    away = torch.device("cpu")
    candidates["ours"] = our_candidate(sizes, device)
    candidates["ours"].move(away if device.type == "cuda" else device)
    note = "disabled by --baseline none" if baseline == "none" else missing_baseline()
    if note is None:
        # Uncompiled on a CPU: see docs/benchmarks.md.
        compiled = device.type == "cuda"
        candidates["baseline"] = baseline_candidate(sizes, device, compiled)
        candidates["baseline"].move(away if device.type == "cuda" else device)
        note = f"transformers' Qwen3-MoE, {'compiled' if compiled else 'not compiled'}, grouped_mm experts"
    return note


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
