"""Benchmark `serve`: text generation compared with `transformers` on the same weights, then a mixed load."""

# Shapes: V vocabulary

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks.arrivals import mixed_load, tails
from benchmarks.baseline_qwen import BASELINE_MISSING, QwenBaseline, Seen, open_baseline
from benchmarks.harness import Deadline, Json, Report, device_name
from openm6.core.config import Config
from openm6.core.device import resolve_device
from openm6.energy.meter import open_meter
from openm6.inference.decode import TextHead
from openm6.inference.decode_batch import DecodeBatch
from openm6.inference.sampling import Sampling
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.nn.cache import PackedWriter, SlotWriter
from openm6.nn.config import ExpertsConfig
from openm6.ops.sequence import causal_meta, join
from openm6.serve.config import EngineConfig


@torch.inference_mode()
def answer_prompts(
    rows: DecodeBatch, prompts: list[list[int]], new_tokens: int, moments: list[float] | None = None
) -> Seen:
    """Generate greedily for all prompts, each from its arrival on (None: all at once)."""
    moments = [0.0] * len(prompts) if moments is None else moments
    waiting, seen = list(enumerate(prompts)), Seen()
    sampling = Sampling(max_tokens=new_tokens)
    began = time.perf_counter()
    while waiting or rows.rows:
        now = time.perf_counter() - began
        if not rows.rows and moments[waiting[0][0]] > now:
            time.sleep(moments[waiting[0][0]] - now)
            now = moments[waiting[0][0]]
        arrived: list[tuple[int, list[int]]] = []
        while waiting and rows.free > len(arrived) and _fits(arrived, waiting[0][1]):
            if moments[waiting[0][0]] > now:
                break
            arrived.append(waiting.pop(0))
        if arrived:
            _read(rows, [prompt for _, prompt in arrived])
        for number, prompt in arrived:
            rows.add(number, sampling, len(prompt) - 1, prompt[-1])
        ended = rows.step()
        now = time.perf_counter() - began
        seen.tokens += len(rows.rows)
        for row in rows.rows:
            seen.first.setdefault(row.key, now)
        for row in ended:
            seen.last[row.key] = now
            rows.remove(row)
    return seen


def _fits(arrived: list[tuple[int, list[int]]], prompt: list[int]) -> bool:
    """Return whether one more prompt fits the pass, as with `max_num_batched_tokens` of the engine."""
    return not arrived or sum(len(other) for _, other in arrived) + len(prompt) <= EngineConfig().max_num_batched_tokens


def _read(rows: DecodeBatch, prompts: list[list[int]]) -> None:
    """Run all but the last token of each prompt, several packed in one row; the first step runs the last token."""
    text_head = rows.text_head
    device = text_head.embedding.device
    ids = torch.tensor([token for prompt in prompts for token in prompt[:-1]], device=device)
    metas = [causal_meta(1, len(prompt) - 1, device=device) for prompt in prompts]
    slots = [rows.next_slot + number for number in range(len(prompts))]
    embedded = torch.nn.functional.embedding(ids[None], text_head.embedding)
    if len(prompts) == 1:
        text_head.backbone(embedded, metas[0], SlotWriter(rows.cache, slots[0]))
        return
    meta = join([replace(part, example_id=part.example_id + n) for n, part in enumerate(metas)])
    text_head.backbone(embedded, meta, PackedWriter(rows.cache, slots))


LOAD = 0.7  # of the throughput of the baseline's best setting here, so that its queue stays bounded


def compare_under_load(
    rows: DecodeBatch,
    baseline: QwenBaseline | None,
    prompts: list[list[int]],
    new_tokens: int,
    rates: dict[str, float],
    report: Report,
) -> None:
    """Send the same prompts at the same random moments to each; `rates` are requests per second with all at once.

    The baseline runs with its default and its best setting of continuous batching: only they take arrivals.
    """
    rate = LOAD * max(rates[name] for name in compared_settings(rates) or rates)
    moments = arrival_moments(len(prompts), rate)
    found: dict[str, Any] = {"arrivals_per_second": rate}
    report["text_under_load"] = found
    ways: dict[str, Callable[[], Seen | str]] = {"openm6": lambda: answer_prompts(rows, prompts, new_tokens, moments)}
    if baseline is not None:
        settings = baseline.batching_settings(prompts, new_tokens)
        ways |= {
            n: partial(baseline.under_load, prompts, new_tokens, moments, settings[n]) for n in compared_settings(rates)
        }
    for name, call in ways.items():
        if report.deadline.passed:
            break
        seen = call()
        found[name] = {"error": seen} if isinstance(seen, str) else summarize(seen, moments)


def compared_settings(rates: dict[str, float]) -> list[str]:
    """Return the names of the baseline's default (first) and fastest setting of continuous batching."""
    batching = [name for name in rates if "continuous" in name]
    return list(dict.fromkeys([*batching[:1], max(batching, key=lambda name: rates[name])])) if batching else []


def arrival_moments(count: int, rate: float) -> list[float]:
    """Return arrival times in seconds with exponential gaps; deterministic for a rate."""
    rng, moment, found = random.Random(1), 0.0, []
    for _ in range(count):
        moment += rng.expovariate(rate)
        found.append(moment)
    return found


def summarize(seen: Seen, moments: list[float]) -> dict[str, Any]:
    """Return times from arrival to the first token and to the whole answer, and requests per second."""
    first = [seen.first[number] - moment for number, moment in enumerate(moments)]
    whole = [seen.last[number] - moment for number, moment in enumerate(moments)]
    return {
        "requests_per_second": len(moments) / max(seen.last.values()),
        "first_token_seconds": tails(first),
        "answer_seconds": tails(whole),
    }


class ServeSetting(Config):
    """Model, requests and batch size."""

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
    new_tokens: int
    rows: int
    seconds: float = 150.0

    @property
    def backbone(self) -> BackboneConfig:
        return BackboneConfig(
            hidden_size=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            experts=ExpertsConfig(
                intermediate_size=self.hidden,
                num_experts=self.experts,
                top_k=2,
                balance="none",
                router_z_loss_coef=0.0,
            ),
        )


RUNS = 3
LONG = 5.0  # seconds from which a run is not repeated

# 0.67B parameters; 128 prompts of 32 to 512 tokens, 144 generated tokens each.
GPU_SETTING = ServeSetting(
    width=1024, layers=12, heads=16, kv_heads=4, head_dim=64, experts=32, hidden=512, vocabulary=32_768,
    requests=128, shortest=32, longest=512, new_tokens=144, rows=128, seconds=400.0,
)  # fmt: skip
CPU_SETTING = ServeSetting(
    width=256, layers=4, heads=4, kv_heads=1, head_dim=64, experts=8, hidden=256, vocabulary=4096,
    requests=16, shortest=16, longest=64, new_tokens=32, rows=16,
)  # fmt: skip


def bench_serve(
    json_path: Json = None,
    load_seconds: Annotated[float, typer.Option("--seconds", min=1, help="Length of the mixed load.")] = 20.0,
    limit: Annotated[
        float | None, typer.Option("--limit", min=1, help="Time after which no other method starts; default by device.")
    ] = None,
) -> None:
    """Measure text generation compared with transformers on the same weights, then a mixed load.

    \b
    Example: python -m benchmarks serve --json serve.json
    """
    device = resolve_device()
    setting = GPU_SETTING if device.type == "cuda" else CPU_SETTING
    with Report(json_path, limit or setting.seconds) as report:
        compare(setting, device, report)
        report["mixed_load"] = None if report.deadline.passed else mixed_load(load_seconds)


def compare(setting: ServeSetting, device: torch.device, report: Report) -> None:
    """Measure offline throughput: all requests at once, greedy, the same for each method."""
    prompts = make_prompts(setting)
    ours, baseline = make_models(setting, device)
    # Opened once, because captured graphs belong to the server and not to its requests.
    rows = DecodeBatch(ours, setting.rows, -(-(setting.longest + setting.new_tokens + 1) // 64) * 64)
    candidates: dict[str, Callable[[], dict[str, Any]]] = {
        "openm6": lambda: ours_run(rows, prompts, setting.new_tokens)
    }
    if baseline is not None:
        candidates |= baseline.ways(prompts, setting.new_tokens)
    found: dict[str, Any] = {}
    report.update(
        {
            "benchmark": "serve",
            "device": device_name(device),
            "torch": torch.__version__,
            "setting": setting.model_dump(),
            "text": found,
            "baseline": baseline.version if baseline is not None else None,
            "baseline_note": BASELINE_MISSING if baseline is None else None,
        }
    )
    report.later("left_out", lambda: [name for name in candidates if name not in found])
    report.at_end(lambda: _ratios(found))
    run_in_turn(candidates, setting, report.deadline, found)
    requests = {name: row["requests_per_second"] for name, row in found.items() if "requests_per_second" in row}
    compare_under_load(rows, baseline, prompts, setting.new_tokens, requests, report)


def _ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Return our rate relative to each method of the baseline, and to the best."""
    rates = {name: row["tokens_per_second"] for name, row in found.items() if "tokens_per_second" in row}
    others = {name: rate for name, rate in rates.items() if name != "openm6"}
    if "openm6" not in rates:
        return {}
    best = max(others, key=lambda name: others[name]) if others else None
    return {
        "best_baseline": best,
        "ours_over_best_baseline": rates["openm6"] / others[best] if best is not None else None,
        "ours_over_each": {name: rates["openm6"] / rate for name, rate in others.items()},
    }


def run_in_turn(
    candidates: dict[str, Callable[[], dict[str, Any]]],
    setting: ServeSetting,
    deadline: Deadline,
    found: dict[str, Any],
) -> None:
    """Run the candidates in turn, up to three times each, and once if it takes long or fails; fill in the medians."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in candidates}
    for number in range(RUNS):
        for name, call in candidates.items():
            own = runs[name]
            if (found and deadline.passed) or (number and own[-1].get("seconds", LONG) >= LONG):
                continue
            if not number:
                call()  # warm up: graphs, kernels, caches
            own.append(_measured(call, setting))
            timed = sorted((run for run in own if "error" not in run), key=lambda run: run["seconds"])
            found[name] = timed[(len(timed) - 1) // 2] if timed else own[0]


def _measured(call: Callable[[], dict[str, Any]], setting: ServeSetting) -> dict[str, Any]:
    """Return tokens per second and joules per request of one run; an expected failure of a baseline is its result."""
    with open_meter() as meter:
        began = time.perf_counter()
        with meter.span() as span:
            extra = call()
        whole = time.perf_counter() - began
    if "error" in extra:
        return extra
    tokens, seconds = extra.pop("tokens"), extra.pop("seconds", whole)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "requests_per_second": setting.requests / seconds,
        "joules_per_request": span.joules * seconds / whole / setting.requests,
        "joules_source": span.source,
        **extra,
    }


def make_prompts(setting: ServeSetting) -> list[list[int]]:
    """Return random ids of uniformly distributed lengths; the same on every machine."""
    rng = random.Random(0)
    lengths = [rng.randint(setting.shortest, setting.longest) for _ in range(setting.requests)]
    return [[rng.randrange(2, setting.vocabulary) for _ in range(length)] for length in lengths]


def make_models(setting: ServeSetting, device: torch.device) -> tuple[TextHead, Any]:
    """Return the backbone with random weights, and the same weights as a Qwen3-MoE of `transformers` if installed."""
    torch.manual_seed(0)
    backbone = Backbone(setting.backbone).eval().requires_grad_(False)
    embedding = torch.randn(setting.vocabulary, setting.width) * 0.02
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    baseline = open_baseline(backbone, embedding, setting.longest + setting.new_tokens + 64, device, dtype)
    backbone.to(device, dtype)
    weight = embedding.to(device, dtype)
    return TextHead(backbone, weight, weight, frozenset()), baseline


def ours_run(rows: DecodeBatch, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Generate for all prompts at once; count all tokens, and measure first tokens from the start."""
    seen = answer_prompts(rows, prompts, new_tokens)
    return {"tokens": seen.tokens, "first_token_seconds_median": statistics.median(seen.first.values())}
