"""Text by continuous batching beside `transformers` on the same weights, then open-loop arrivals on mixed routes."""

# Letters: V vocabulary

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.arrivals import mixed_load
from benchmarks.measure import device_name
from benchmarks.our_text import answer_prompts
from benchmarks.peer_qwen import PEER_MISSING, open_peer
from benchmarks.report import Report
from benchmarks.text_load import compare_under_load
from openm6.base.config import Config
from openm6.base.device import own_device
from openm6.base.energy.meter import open_meter
from openm6.inference.decode import Speaker
from openm6.inference.graphs import open_rows
from openm6.inference.text import TextRows
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.nn.config import ExpertsConfig


class ServeSetting(Config):
    """The model, the requests, and how many are worked on at once."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    hidden: int
    vocabulary: int
    requests: int
    shortest: int
    longest: int
    given: int
    rows: int
    seconds: float = 150.0

    @property
    def backbone(self) -> BackboneConfig:
        return BackboneConfig(
            width=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            experts=ExpertsConfig(
                hidden=self.hidden, num_experts=self.experts, top_k=2, balance="none", z_weight=0.0
            ),
        )


LONG = 5.0  # seconds of a run that is not repeated

# 0.67B parameters; 128 prompts of 32 to 512 tokens, 144 tokens given to each.
GPU_SETTING = ServeSetting(
    width=1024, layers=12, heads=16, kv_heads=4, head_dim=64, experts=32, hidden=512, vocabulary=32_768,
    requests=128, shortest=32, longest=512, given=144, rows=128, seconds=400.0,
)  # fmt: skip
CPU_SETTING = ServeSetting(
    width=256, layers=4, heads=4, kv_heads=1, head_dim=64, experts=8, hidden=256, vocabulary=4096,
    requests=16, shortest=16, longest=64, given=32, rows=16,
)  # fmt: skip


def bench_serve(json_path: Path | None = None, load_seconds: float = 20.0) -> None:
    """Prints throughput, first-token times and tails of both, and the latencies of a mixed load."""
    device = own_device()
    setting = GPU_SETTING if device.type == "cuda" else CPU_SETTING
    with Report(json_path, setting.seconds) as report:
        compare(setting, device, report)
        report["mixed_load"] = mixed_load(load_seconds)


def compare(setting: ServeSetting, device: torch.device, report: Report) -> None:
    """Offline throughput into the report: all requests there at once; each answers the same ones, greedily."""
    prompts = make_prompts(setting)
    ours, peer = make_models(setting, device)
    # Made once: captured graphs are part of a running server, not of its requests.
    rows = open_rows(ours, setting.rows, -(-(setting.longest + setting.given + 1) // 64) * 64)
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        "openm6": lambda: ours_run(rows, prompts, setting.given)
    }
    if peer is not None:
        contenders |= peer.ways(prompts, setting.given)
    found: dict[str, Any] = {}
    left_out: list[str] = []
    report.update(
        {
            "benchmark": "serve",
            "device": device_name(device),
            "torch": torch.__version__,
            "setting": setting.model_dump(),
            "text": found,
            "peer": peer.version if peer is not None else None,
            "peer_note": PEER_MISSING if peer is None else None,
            "left_out": left_out,
        }
    )
    report.at_end(lambda: _ratios(found))
    for name, call in contenders.items():
        if found and report.deadline.passed:
            left_out.append(name)
            continue
        call()  # warm up: graphs, kernels, caches
        found[name] = _median_run(call, setting)
    requests = {name: row["requests_a_second"] for name, row in found.items() if "requests_a_second" in row}
    report["text_under_load"] = compare_under_load(rows, peer, prompts, setting.given, requests)


def _ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Our rate over that of each other way, and of the best."""
    rates = {name: row["tokens_a_second"] for name, row in found.items() if "tokens_a_second" in row}
    others = {name: rate for name, rate in rates.items() if name != "openm6"}
    if "openm6" not in rates:
        return {}
    best = max(others, key=lambda name: others[name]) if others else None
    return {
        "best_peer": best,
        "ours_over_best_peer": rates["openm6"] / others[best] if best is not None else None,
        "ours_over_each": {name: rates["openm6"] / rate for name, rate in others.items()},
    }


def _median_run(call: Callable[[], dict[str, Any]], setting: ServeSetting) -> dict[str, Any]:
    """The run of median rate of three; of one alone where it takes long or fails."""
    runs = [_measured(call, setting)]
    while len(runs) < 3 and runs[-1].get("seconds", LONG) < LONG:
        runs.append(_measured(call, setting))
    if len(runs) < 3 or any("error" in run for run in runs):
        return runs[0]
    return sorted(runs, key=lambda run: run["seconds"])[1]


def _measured(call: Callable[[], dict[str, Any]], setting: ServeSetting) -> dict[str, Any]:
    """Tokens a second and joules a request of one run; an expected failure of a peer is its result."""
    with open_meter() as meter:
        began = time.perf_counter()
        with meter.span() as span:
            extra = call()
        seconds = time.perf_counter() - began
    if "error" in extra:
        return extra
    tokens = extra.pop("tokens")
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_a_second": tokens / seconds,
        "requests_a_second": setting.requests / seconds,
        "joules_a_request": span.joules / setting.requests,
        "joules_source": span.source,
        **extra,
    }


def make_prompts(setting: ServeSetting) -> list[list[int]]:
    """Random ids, lengths spread evenly; the same on every machine."""
    dice = random.Random(0)
    lengths = [dice.randint(setting.shortest, setting.longest) for _ in range(setting.requests)]
    return [[dice.randrange(2, setting.vocabulary) for _ in range(length)] for length in lengths]


def make_models(setting: ServeSetting, device: torch.device) -> tuple[Speaker, Any]:
    """Our backbone with random weights, and the same weights as a Qwen3-MoE of `transformers` where installed."""
    torch.manual_seed(0)
    backbone = Backbone(setting.backbone).eval().requires_grad_(False)
    embedding = torch.randn(setting.vocabulary, setting.width) * 0.02
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peer = open_peer(backbone, embedding, setting.longest + setting.given + 64, device, dtype)
    backbone.to(device, dtype)
    weight = embedding.to(device, dtype)
    return Speaker(backbone, weight, weight, None, None), peer


def ours_run(rows: TextRows, prompts: list[list[int]], given: int) -> dict[str, Any]:
    """All prompts at once; each token drawn is counted, first-token times are from the start."""
    seen = answer_prompts(rows, prompts, given)
    return {"tokens": seen.tokens, "first_token_seconds_median": statistics.median(seen.first.values())}
