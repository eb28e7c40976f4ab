"""Open-loop load: requests of all kinds that arrive independently of earlier answers."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openm6.core.device import resolve_device
from openm6.inference.load import LoadedModel
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.interface import Part
from openm6.modalities.registry import ModalitiesConfig, build_modalities
from openm6.modalities.text import train_tokenizer
from openm6.models.description import CheckpointConfig
from openm6.models.omni import Omni
from openm6.models.presets import PRESETS
from openm6.serve.config import EngineConfig
from openm6.serve.engine import Engine
from openm6.serve.requests import (
    CodesRequest,
    NumbersRequest,
    QueueFullError,
    Request,
    TextRequest,
    prepare,
)
from openm6.serve.worker import RequestHandle

WORDS = ("draw the digit seven", "what is the mass of a small red apple", "say zero")


@dataclass
class Load:
    """Answered and refused requests of a run, by kind."""

    handles: list[tuple[str, RequestHandle]] = field(default_factory=list)
    refused: int = 0


def mixed_load(seconds: float, preset: str = "nano", fraction: float = 0.8) -> dict[str, Any]:
    """Return rates and latencies by kind under Poisson arrivals at a fraction of the measured capacity."""
    loaded = untrained(preset)
    with Engine(loaded, EngineConfig(max_num_seqs=16, max_model_len=256, max_queued_tokens=10**9)) as engine:
        capacity = _capacity(engine)
        rate = fraction * capacity
        load = arrive(engine, rate, seconds, random.Random(1))
        for _, handle in load.handles:
            handle.wait(120)
    return {
        "preset": preset,
        "capacity_requests_per_second": capacity,
        "arrivals_per_second": rate,
        **_summary(load),
    }


def untrained(preset: str) -> LoadedModel:
    """Return a model of all modalities with random weights, on which latencies do not depend."""
    modalities = build_modalities(ModalitiesConfig(), train_tokenizer(WORDS, 320), {"mass": (3.0, 1.0)})
    backbone = PRESETS[preset].backbone
    torch.manual_seed(0)
    omni = Omni(backbone, modalities).eval().requires_grad_(False).to(resolve_device())
    description = CheckpointConfig(
        backbone=backbone, modalities=ModalitiesConfig(), scales={"mass": (3.0, 1.0)}, trained_tasks=[]
    )
    return LoadedModel(omni, modalities, description, Path("untrained"))


def requests_of(index: int) -> tuple[str, Request]:
    """Return the n-th request: two texts per image, audio or number, each with its own seed."""
    words = (Part("text", WORDS[index % len(WORDS)]),)
    client = f"client {index % 5}"
    sampling = Sampling(temperature=0.8, max_tokens=24, seed=index)
    masked = MaskedSampling(steps=4, seed=index)
    kinds: tuple[tuple[str, Request], ...] = (
        ("text", TextRequest(parts=words, client=client, sampling=sampling)),
        ("text", TextRequest(parts=words, client=client, sampling=Sampling(max_tokens=24))),
        ("image", CodesRequest(parts=words, client=client, modality="image", sampling=masked)),
        ("text", TextRequest(parts=words, client=client, sampling=sampling)),
        ("audio", CodesRequest(parts=words, client=client, modality="audio", sampling=masked)),
        ("numbers", NumbersRequest(parts=words, client=client, columns=("mass",))),
    )
    return kinds[index % len(kinds)]


def _capacity(engine: Engine, count: int = 36) -> float:
    """Return requests per second when all are queued at once."""
    for index in range(6):
        _submit(engine, index)[1].wait(120)
    began = time.perf_counter()
    for _, handle in [_submit(engine, index) for index in range(count)]:
        handle.wait(120)
    return count / (time.perf_counter() - began)


def _submit(engine: Engine, index: int) -> tuple[str, RequestHandle]:
    kind, request = requests_of(index)
    return kind, engine.submit([prepare(request, engine.loaded, engine.config.max_model_len)])[0]


def arrive(engine: Engine, rate: float, seconds: float, rng: random.Random) -> Load:
    """Submit at random moments, `rate` per second on average, independently of earlier answers."""
    load, index = Load(), 0
    moment = time.perf_counter()
    end = moment + seconds
    while True:
        moment += rng.expovariate(rate)
        if moment >= end:
            return load
        time.sleep(max(0.0, moment - time.perf_counter()))
        index += 1
        try:
            load.handles.append(_submit(engine, index))
        except QueueFullError:
            load.refused += 1


def _summary(load: Load) -> dict[str, Any]:
    """Return median and tails of the whole answer by kind, and of the first token of texts."""
    seconds: dict[str, list[float]] = {}
    first: list[float] = []
    joules = 0.0
    for kind, handle in load.handles:
        answer = handle.wait()
        seconds.setdefault(kind, []).append(answer.seconds)
        joules += answer.joules or 0.0
        if kind == "text":
            first.append(answer.first_token_seconds)
    return {
        "answered": len(load.handles),
        "refused": load.refused,
        "joules_per_request": joules / max(1, len(load.handles)),
        "answer_seconds": {kind: tails(found) for kind, found in sorted(seconds.items())},
        "first_token_seconds": tails(first),
    }


def tails(found: list[float]) -> dict[str, float]:
    """Return median, 95th and 99th percentile."""
    quantiles = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {name: float(np.quantile(found, q)) if found else float("nan") for name, q in quantiles.items()}
