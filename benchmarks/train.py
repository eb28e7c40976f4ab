"""The benchmark train: tokens a second of a whole training step, beside transformers' Qwen3-MoE of the same sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.candidate import Contender, take_turns, time_parts
from benchmarks.decoder import our_contender
from benchmarks.harness import Json, Peer, Report, SizesName, TimeLimit, device_name, speed_ratio
from benchmarks.peer import missing_peer, peer_contender
from benchmarks.sizes import Sizes, choose_sizes, default_name, peak_tflops
from openm6.base.device import own_device
from openm6.base.errors import ConfigError

PEERS = ("transformers", "none")


def bench_train(
    config: SizesName = None,
    peer: Peer = "transformers",
    seconds: TimeLimit = None,
    json_path: Json = None,
) -> dict[str, Any]:
    """Tokens a second of a whole training step, and where its time goes, beside transformers' Qwen3-MoE.

    \b
    Example: python -m benchmarks train --config a --json train.json
    """
    if peer not in PEERS:
        raise ConfigError(f"no peer {peer!r}: choose {' or '.join(PEERS)}")
    device = own_device()
    sizes, name = choose_sizes(config, device), config or default_name(device)
    on_gpu = device.type == "cuda"
    contenders: dict[str, Contender] = {}
    parts: dict[str, dict[str, float]] = {}
    turns, steps = (4, 8) if on_gpu else (3, 4)
    with Report(json_path, seconds or (360.0 if on_gpu else 120.0)) as report:
        for who in ("ours", "peer"):
            report.later(who, partial(_figures, who, contenders, parts, sizes, device))
        report.later("ratio", lambda: speed_ratio(report.found["ours"], report.found["peer"]))
        report.update({"device": device_name(device), "config": {"name": name, **sizes.model_dump()}})
        report["torch"] = torch.__version__
        report["peer_note"] = _open_contenders(contenders, sizes, device, peer)
        take_turns(contenders, device, turns, steps, report.deadline)
        for who, contender in contenders.items():
            parts[who] = time_parts(contender, device, report.deadline)
    return report.found


def _open_contenders(contenders: dict[str, Contender], sizes: Sizes, device: torch.device, peer: str) -> str:
    """Adds both models, parked where they do not fit side by side; gives a word on the peer."""
    away = torch.device("cpu")
    contenders["ours"] = our_contender(sizes, device)
    contenders["ours"].move(away if device.type == "cuda" else device)
    note = "left out, as asked" if peer == "none" else missing_peer()
    if note is None:
        # On a processor its compiled form is the slower one: see docs/performance.md.
        compiled = device.type == "cuda"
        contenders["peer"] = peer_contender(sizes, device, compiled)
        contenders["peer"].move(away if device.type == "cuda" else device)
        note = f"transformers' Qwen3-MoE, {'compiled' if compiled else 'not compiled'}, grouped_mm experts"
    return note


def _figures(
    who: str,
    contenders: Mapping[str, Contender],
    parts: Mapping[str, dict[str, float]],
    sizes: Sizes,
    device: torch.device,
) -> dict[str, Any] | None:
    """The figures of one contender under the names of the report; None where it was not timed."""
    if who not in contenders or not contenders[who].timing.seconds:
        return None
    contender = contenders[who]
    median = contender.timing.median
    tflops, peak = sizes.flops / median / 1e12, peak_tflops(device)
    return {
        "tokens_per_second": round(sizes.tokens / median, 1),
        "mfu": None if peak is None else round(tflops / peak, 4),
        "tflops": round(tflops, 4),
        "peak_memory_gib": round(contender.peak_bytes / 2**30, 2) if contender.peak_bytes else None,
        "breakdown_ms": parts.get(who),
        "step_seconds": contender.timing.summary(),
        "recompilations": contender.recompiled,
        "parameters": sum(parameter.numel() for parameter in contender.model.parameters()),
    }
