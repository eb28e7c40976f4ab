"""Benchmark `decode`: one text at a time on a processor, compared with `transformers` and llama.cpp at equal bits."""

# Shapes: V vocabulary, D hidden size

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.baseline_llama import (
    LLAMA_CPP_MISSING,
    Decode,
    llama_cpp_candidates,
    transformers_candidates,
)
from benchmarks.baseline_qwen import BASELINE_MISSING
from benchmarks.harness import Json, Report, Seconds, Timing, alternate, device_name
from openm6.core.device import usable_cores
from openm6.inference.decode import TextHead
from openm6.inference.decode_batch import DecodeBatch
from openm6.inference.load import quantize
from openm6.inference.sampling import Sampling
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.nn.cache import SlotWriter
from openm6.nn.config import DenseConfig
from openm6.ops.int8 import Int8Weight
from openm6.ops.sequence import causal_meta

# The shape of SmolLM2-135M.
SHAPE = BackboneConfig(
    hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    dense=DenseConfig(intermediate_size=1536), qk_norm=False,
)  # fmt: skip
VOCABULARY = 49_152
PROMPT = [11, 5, 8, 13]
EQUAL_BITS = {
    "openm6 fp32": "llama.cpp F32",
    "openm6 bf16": "llama.cpp BF16",
    "openm6 int8": "llama.cpp Q8_0",
}
COMPILED = ", compiled"

Tokens = Annotated[int, typer.Option("--tokens", min=2, help="Generated tokens per run.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of every candidate; default: cores.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each candidate.")]


def bench_decode(
    tokens: Tokens = 32,
    threads: Threads = None,
    repeats: Repeats = 5,
    seconds: Seconds = 400.0,
    json_path: Json = None,
) -> None:
    """Measure a dense decoder of 135M parameters with random weights: tokens per second of one greedy text.

    \b
    Example: python -m benchmarks decode --threads 1 --json decode.json
    """
    before, threads = torch.get_num_threads(), threads or usable_cores()
    torch.set_num_threads(threads)
    try:
        with Report(json_path, seconds) as report, tempfile.TemporaryDirectory() as folder:
            compare(SHAPE, VOCABULARY, tokens, threads, repeats, Path(folder), report)
    finally:
        torch.set_num_threads(before)


def compare(
    shape: BackboneConfig, vocabulary: int, tokens: int, threads: int, repeats: int, folder: Path, report: Report
) -> None:
    """Time all candidates in turn, on the same weights, and report the first text of each."""
    backbone, embedding = random_weights(shape, vocabulary)
    timings: dict[str, Timing] = {}
    texts: dict[str, list[int]] = {}
    versions: dict[str, str] = {"torch": torch.__version__}
    notes: list[str] = []
    report.update(
        {
            "benchmark": "decode",
            "device": device_name(torch.device("cpu")),
            "versions": versions,
            "notes": notes,
            "tokens_per_run": tokens,
        }
    )
    report.at_end(lambda: summary(timings, texts, tokens))
    # All of llama.cpp and transformers first: they need the weights as they are.
    others: dict[str, Decode] = {}
    libraries = optional("llama_cpp", versions), optional("gguf", versions)
    if None in libraries:
        notes.append(LLAMA_CPP_MISSING)
    else:
        others |= llama_cpp_candidates(libraries, folder, backbone, embedding, PROMPT, tokens, threads)
    library = optional("transformers", versions)
    if library is None:
        notes.append(BASELINE_MISSING)
    else:
        others |= transformers_candidates(library, backbone, embedding, PROMPT, tokens)
    candidates = {**our_candidates(shape, vocabulary, tokens), **others}
    for name, call in list(candidates.items()):
        if report.deadline.passed:
            notes.append(f"no time was left for {name}")
            del candidates[name]
        else:
            texts[name] = call()  # warm up: kernels, caches, compilation
    alternate(candidates, repeats, 0, report.deadline, into=timings)


def optional(name: str, versions: dict[str, str]) -> Any:
    """Return a library and note its version; None if it is not installed."""
    try:
        library = importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    versions[name] = getattr(library, "__version__", "unknown")
    return library


def random_weights(shape: BackboneConfig, vocabulary: int) -> tuple[Backbone, Tensor]:
    """Return the same backbone and embedding at each call."""
    torch.manual_seed(0)
    return Backbone(shape).eval().requires_grad_(False), torch.randn(vocabulary, shape.hidden_size) * 0.02


def our_candidates(shape: BackboneConfig, vocabulary: int, tokens: int) -> dict[str, Decode]:
    """Return our decoding in fp32, bf16 and int8, each with layers as they are and compiled."""
    found: dict[str, Decode] = {}
    for name in EQUAL_BITS:
        backbone, embedding = random_weights(shape, vocabulary)
        head: Tensor | Int8Weight
        if name == "openm6 bf16":
            backbone.to(torch.bfloat16)
            embedding = embedding.bfloat16()
        head = embedding
        if name == "openm6 int8":
            quantize(backbone)
            head = Int8Weight.of(embedding)
        text_head = TextHead(backbone, embedding, head, frozenset())
        found[f"{name}{COMPILED}"] = partial(decode, DecodeBatch(text_head, 1, 256, compiled=True), tokens)
        found[name] = partial(decode, DecodeBatch(text_head, 1, 256), tokens)
    return found


@torch.inference_mode()
def decode(batch: DecodeBatch, tokens: int) -> list[int]:
    """Return the greedy text after the prompt."""
    embedded = torch.nn.functional.embedding(torch.tensor([PROMPT[:-1]]), batch.text_head.embedding)
    batch.text_head.backbone(embedded, causal_meta(1, len(PROMPT) - 1), SlotWriter(batch.cache, 0))
    row = batch.add(0, Sampling(max_tokens=tokens), len(PROMPT) - 1, PROMPT[-1])
    while not batch.step():
        pass
    batch.remove(row)
    return row.tokens


def summary(timings: Mapping[str, Timing], texts: Mapping[str, list[int]], tokens: int) -> dict[str, Any]:
    """Return tokens per second by median and fastest run, and our ratios."""
    timed = {name: timing for name, timing in timings.items() if timing.seconds}
    rates = {name: tokens / timing.median for name, timing in timed.items()}
    reference = texts.get("openm6 fp32", [])
    others = {name: rate for name, rate in rates.items() if name.startswith("transformers")}
    best = max(others, key=lambda name: others[name]) if others else None
    ours = {name: rate for name, rate in rates.items() if name.startswith("openm6")}
    return {
        "candidates": {
            name: {
                "tokens_per_second": round(rates[name], 1),
                "fastest": round(tokens / min(timing.seconds), 1),
                "runs": len(timing.seconds),
                "first_tokens_as_fp32": _equal(texts[name], reference),
            }
            for name, timing in timed.items()
        },
        "best_transformers": best,
        "over_best_transformers": {name: round(rate / others[best], 2) for name, rate in ours.items()} if best else {},
        "over_llama_cpp_at_equal_bits": {
            name: round(rate / rates[other], 2)
            for name, rate in ours.items()
            if (other := EQUAL_BITS[name.removesuffix(COMPILED)]) in rates
        },
    }


def _equal(text: list[int], reference: list[int]) -> int:
    """Return how many first tokens are equal."""
    pairs = enumerate(zip(text, reference, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(text), len(reference)))
