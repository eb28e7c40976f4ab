"""Benchmark `offload`: steps of an offloaded model on real tokens, split into compute and transfers."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.baseline_deepspeed import max_deepspeed_size
from benchmarks.harness import Deadline, Json, Report, Seconds, Steps, device_name
from openm6.core.config import build
from openm6.core.device import resolve_device
from openm6.core.errors import ConfigError
from openm6.core.run_folder import RunFolder
from openm6.energy.meter import Meter, open_meter
from openm6.optim.config import PRECISION_OF_BYTES
from openm6.train.multimodal import MultimodalTraining
from openm6.train.offloaded import OffloadedTrainStep
from openm6.train.recipe import MultimodalRecipe

BYTES, ROUNDS = 2**28, 16


def link_ceiling(device: torch.device) -> float | None:
    """Return gigabytes per second of pinned memory, both directions together; None without a GPU."""
    if device.type != "cuda":
        return None
    inside = [torch.empty(BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    outside = [torch.empty(BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    pairs = [(inside[0], outside[0]), (outside[1], inside[1])]
    _copy(pairs, streams, 2)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    _copy(pairs, streams, ROUNDS)
    torch.cuda.synchronize(device)
    return 2 * ROUNDS * BYTES / (time.perf_counter() - began) / 1e9


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]], streams: list[torch.cuda.Stream], rounds: int) -> None:
    for _ in range(rounds):
        for (target, source), stream in zip(pairs, streams, strict=True):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)


GIB = 2**30
GPT3_JOULES_A_TOKEN = 15.4  # 1,287 MWh for 300 billion tokens (2104.10350)
PHASES = ("fetch", "update", "write_back")


@dataclass(frozen=True)
class OffloadSize:
    """A model and a step; the defaults are for two cores without a GPU.

    tokens per step: rows · length; head_dim is 128 from a width of 1024 on, 32 below
    """

    width: int = 128
    layers: int = 6
    experts: int = 8
    hidden: int = 128
    top_k: int = 1
    rows: int = 4
    length: int = 256
    vocabulary: int = 2048
    bytes_per_parameter: int = 2
    num_gpu_layers: str = "0"
    gradient_accumulation_steps: int = 2
    activation_checkpointing_every: int = 1
    activation_storage: str = "device"
    margin_gib: float = 4.0

    def recipe(self, num_gpu_layers: str | None = None) -> MultimodalRecipe:
        """Return a recipe on the definitions and poems of the package.

        Raises:
            ConfigError: bytes per parameter without a precision, or layers on the device that are no number.
        """
        head = 128 if self.width >= 1024 else 32
        heads = self.width // head
        names = ("wordnet_en", "poems_zh")
        if self.bytes_per_parameter not in PRECISION_OF_BYTES:
            raise ConfigError(f"--bytes {self.bytes_per_parameter} must be 16, 4, 2 or 1")
        where = self.num_gpu_layers if num_gpu_layers is None else num_gpu_layers
        if where != "auto" and not where.isdigit():
            raise ConfigError(f"--num-gpu-layers {where} must be a number of layers, or auto")
        offload = {
            "num_gpu_layers": where if where == "auto" else int(where),
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "activation_checkpointing_every": self.activation_checkpointing_every,
            "activation_storage": self.activation_storage,
            "margin_gib": self.margin_gib,
        }
        overrides = {
            "hidden_size": self.width, "num_layers": self.layers, "num_heads": heads, "head_dim": head,
            "num_kv_heads": max(1, heads // 4),
            "experts": {"intermediate_size": self.hidden, "num_experts": self.experts, "top_k": self.top_k},
        }  # fmt: skip
        values = {
            "model": {"preset": "nano", "overrides": overrides},
            "modalities": {"text": {"vocab_size": self.vocabulary}},
            "sources": {name: {"kind": "embedded", "name": name} for name in names},
            "mixture": [
                {"source": "wordnet_en", "task": "reverse_dictionary", "weight": 2},
                {"source": "poems_zh", "task": "text_generation"},
            ],
            "packing": {"batch_size": self.rows, "seq_len": self.length},
            "loop": {
                "steps": 1000,
                "optimizer": {
                    "learning_rate": 1e-4,
                    "precision": PRECISION_OF_BYTES[self.bytes_per_parameter],
                },
                "schedule": {"warmup_steps": 10},
                "offload": offload,
            },
        }
        return build(MultimodalRecipe, values, "bench offload")


@dataclass(frozen=True)
class StepTimes:
    """One step: seconds, seconds by phase, tokens, and bytes over the link."""

    seconds: float
    phases: dict[str, float]
    tokens: int
    moved_bytes: int


def bench_offload(
    width: Annotated[int, typer.Option("--width", min=1, help="Hidden size.")] = 128,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Layers.")] = 6,
    experts: Annotated[int, typer.Option("--experts", min=1, help="Experts per layer.")] = 8,
    hidden: Annotated[int, typer.Option("--hidden", min=8, help="Intermediate size of an expert.")] = 128,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Experts per token.")] = 1,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows per step.")] = 4,
    length: Annotated[int, typer.Option("--length", min=16, help="Tokens per row.")] = 256,
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=1, help="Vocabulary size.")] = 2048,
    size: Annotated[int, typer.Option("--bytes", metavar="16|4|2|1", help="Bytes per parameter.")] = 2,
    num_gpu_layers: Annotated[
        str, typer.Option("--num-gpu-layers", help="Layers that stay on the device: a number or auto.")
    ] = "0",
    gradient_accumulation_steps: Annotated[
        int, typer.Option("--gradient-accumulation-steps", min=1, help="Micro-batches per step.")
    ] = 2,
    activation_checkpointing_every: Annotated[
        int,
        typer.Option("--activation-checkpointing-every", min=1, help="Store the input of every n-th layer only."),
    ] = 1,
    activation_storage: Annotated[
        str, typer.Option("--activation-storage", help="Storage of layer inputs: device or host.")
    ] = "device",
    margin: Annotated[float, typer.Option("--margin", help="GiB of device memory that auto leaves free.")] = 4.0,
    steps: Steps = 4,
    curve: Annotated[
        bool, typer.Option("--curve", help="Add the time of a step by fraction of offloaded layers.")
    ] = False,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="deepspeed: find the largest size that it trains.")
    ] = None,
    seconds: Seconds = 420.0,
    json_path: Json = None,
) -> None:
    """Train an offloaded model for a few steps and report compute and transfer times.

    \b
    Example: python -m benchmarks offload --width 4096 --layers 51 --experts 32 --hidden 4096 --rows 32 --length 2048
    --bytes 2 --num-gpu-layers auto --gradient-accumulation-steps 4 --json offload.json
    """
    sizes = (
        width, layers, experts, hidden, top_k, rows, length, vocabulary, size, num_gpu_layers,
        gradient_accumulation_steps, activation_checkpointing_every, activation_storage, margin,
    )  # fmt: skip
    measure(OffloadSize(*sizes), steps, baseline, curve, seconds, json_path)


def measure(
    size: OffloadSize, steps: int, baseline: str | None, curve: bool, seconds: float, json_path: Path | None
) -> None:
    """Measure, print one JSON object and write it to `json_path`.

    Raises:
        ConfigError: the model does not fit this machine, or no such baseline.
    """
    if baseline not in (None, "deepspeed"):
        raise ConfigError(f"--baseline {baseline} is unknown: use deepspeed")
    device = resolve_device()
    with Report(json_path, seconds) as report:
        report["device"] = device_name(device)
        with open_meter() as meter:
            measure_offload(report, size, steps, device, meter)
        if curve:
            report["curve"] = []
            offload_curve(size, device, report.deadline, report.found["curve"])
        if baseline is not None:
            compare_with_deepspeed(report, size.length)


def compare_with_deepspeed(report: Report, length: int) -> None:
    """Add each size that DeepSpeed trains; the ratio to the largest only if a larger one failed."""
    torch.cuda.empty_cache()  # its processes need the memory of the device
    ran: list[dict[str, Any]] = []
    report["baseline_sizes"] = ran
    report.later("baseline", lambda: ran[-1] if ran else None)
    failed, report["baseline_note"] = max_deepspeed_size(length, report.deadline, ran)
    if failed and ran:
        report["times_the_baseline"] = report.found["parameters"] / ran[-1]["parameters"]


def measure_offload(report: Report, size: OffloadSize, steps: int, device: torch.device, meter: Meter) -> None:
    """Add the results of one size to the report; the first step is a warm-up."""
    times: list[StepTimes] = []
    with tempfile.TemporaryDirectory() as folder:
        training, train_step = _open(size, None, folder, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        batches = training.batches()
        _timed_step(training, train_step, next(batches), 1)
        report.at_end(lambda: {} if settled or not times else _figures(size, training, train_step, times, device))
        settled = False
        with meter.span() as span:
            while len(times) < steps and not (times and report.deadline.passed):
                times.append(_timed_step(training, train_step, next(batches), len(times) + 2))
        # Immediately, because the next measurement would count as peak memory of this size.
        report.update(_figures(size, training, train_step, times, device))
        report.update(_energy(span.joules, span.source, sum(time.tokens for time in times)))
        settled = True
        train_step.close()
    ceiling = link_ceiling(device)
    fraction = report.found["link_gbps"] / ceiling if ceiling else None
    report.update({"link_ceiling_gbps": ceiling, "link_fraction": fraction})


def offload_curve(size: OffloadSize, device: torch.device, deadline: Deadline, found: list[dict[str, float]]) -> None:
    """Add seconds per step by fraction of offloaded layers, from none to all."""
    for quarter in range(5):
        offloaded = round(size.layers * quarter / 4)
        with tempfile.TemporaryDirectory() as folder:
            training, train_step = _open(size, str(size.layers - offloaded), folder, device)
            batches = training.batches()
            times = [_timed_step(training, train_step, next(batches), step) for step in (1, 2, 3)]
            train_step.close()
        seconds = min(time.seconds for time in times[1:])
        found.append({"offloaded": offloaded / size.layers, "seconds_per_step": seconds})
        if deadline.passed:
            break


def _open(
    size: OffloadSize, num_gpu_layers: str | None, folder: str, device: torch.device
) -> tuple[MultimodalTraining, OffloadedTrainStep]:
    recipe = size.recipe(num_gpu_layers)
    training = MultimodalTraining(recipe, RunFolder.open(folder), device)
    return training, OffloadedTrainStep(training, recipe.loop)


class PhaseTimer:
    """Add up the time that the compute stream spends in each named span."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what is enqueued within; spans of different names must not overlap."""
        began = self._now()
        yield
        self._spans.append((name, began, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return seconds by name; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        found: dict[str, float] = defaultdict(float)
        for name, began, ended in self._spans:
            found[name] += began.elapsed_time(ended) / 1000 if self._cuda else ended - began
        return dict(found)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _timed_step(training: MultimodalTraining, train_step: OffloadedTrainStep, batch: Any, step: int) -> StepTimes:
    """Time one step from its first fetch to its last write-back."""
    store, before = train_step.store, train_step.store.moved_bytes
    store.synchronize()
    timer = PhaseTimer(store.device)
    store.span = timer.span
    began = time.perf_counter()
    train_step.update(batch, step, None)
    with timer.span("write_back"):
        store.synchronize()
    ended = time.perf_counter()
    return StepTimes(ended - began, timer.seconds(), batch.tokens, store.moved_bytes - before)


def _figures(
    size: OffloadSize,
    training: MultimodalTraining,
    train_step: OffloadedTrainStep,
    times: list[StepTimes],
    device: torch.device,
) -> dict[str, Any]:
    total, active = training.omni.count_parameters()
    seconds = statistics.median(time.seconds for time in times)
    phases = {name: statistics.median(time.phases.get(name, 0.0) for time in times) for name in PHASES}
    tokens = statistics.mean(time.tokens for time in times)
    moved = statistics.median(time.moved_bytes for time in times)
    budget = train_step.budget(train_step.store.layouts)
    gpu = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    return {
        "parameters": total,
        "active_parameters": active,
        "bytes_per_parameter": budget.checkpoint_bytes / budget.parameters,
        "budget_gib": {
            f"{tier}: {what}": size / GIB
            for (tier, what), size in budget.entries(tuple(train_step.store.on_device)).items()
            if size
        },
        "sets_on_device": len(train_step.store.on_device),
        "sets": train_step.num_shards,
        "seconds_per_step": seconds,
        "seconds": {**phases, "compute": seconds - sum(phases.values())},
        "tokens_per_step": tokens,
        "positions_per_step": size.rows * size.length,
        "tokens_per_second": tokens / seconds,
        # Forward and backward take 6 operations per parameter and token; recomputation makes them 8.
        "tflops": 6 * active * tokens / seconds / 1e12,
        "tflops_with_recompute": 8 * active * tokens / seconds / 1e12,
        "link_gbps": moved / seconds / 1e9,
        "peak_gpu_gib": gpu,
        "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }


def _energy(joules: float, source: str, tokens: int) -> dict[str, Any]:
    each = joules / max(1, tokens)
    return {
        "joules_per_token": each,
        "joules_source": source,
        "fraction_of_gpt3_joules": each / GPT3_JOULES_A_TOKEN,
    }
