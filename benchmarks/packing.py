"""Benchmark `packing`: training on packed multimodal examples and on dense rows of text, with the same model."""

# Shapes: R rows, S tokens of a row

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import Json, Report, TimeLimit, Timing, alternate, device_name, speed_ratio
from openm6.core.device import resolve_device
from openm6.core.errors import ConfigError
from openm6.core.run_folder import RunFolder
from openm6.data.parquet import EmbeddedConfig
from openm6.data.source import Source
from openm6.data.sources import open_sources
from openm6.modalities.batch import Batch, build_sequence, collate
from openm6.modalities.text import Text
from openm6.nn.executor import CheckpointedExecutor, CompiledExecutor
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import read_recipe, recipe_path
from openm6.train.step import TrainStep

RECIPE = "demo"  # its mixture of embedded data has all sixteen pairs of modalities
GOAL = 0.9
BATCHES = {"cpu": 8, "cuda": 16}  # distinct batches of each kind
SIZES = {
    "cpu": ["packing.batch_size=2", "packing.seq_len=512"],
    "cuda": [
        "model.preset=base",
        "packing.batch_size=8",
        "packing.seq_len=2048",
        "modalities.text.vocab_size=4096",
    ],
}
TEXTS = ("wordnet_en", "poems_zh")  # embedded data that dense rows are filled with


@dataclass
class Stream:
    """Batches of one kind, and the real tokens of those that were timed."""

    batches: Sequence[Batch]
    timing: Timing = field(default_factory=Timing)
    making: list[float] = field(default_factory=list)  # seconds to make each batch, on one core

    def __post_init__(self) -> None:
        self._next = itertools.cycle(self.batches)
        self.tokens: list[int] = []

    def step(self, train_step: TrainStep, number: Iterator[int]) -> None:
        """Run forward, backward and update on the next batch."""
        batch = next(self._next)
        self.tokens.append(batch.tokens)
        train_step.update(batch, next(number), None)


def bench_packing(
    seconds: TimeLimit = None,
    json_path: Json = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings of the recipe demo.")
    ] = None,
) -> dict[str, Any]:
    """Compare training on packed multimodal examples and on dense rows of text: tokens per second and padding.

    \b
    Example: python -m benchmarks packing --json packing.json
    """
    device = resolve_device()
    words = [*SIZES[device.type], *(overrides or [])]
    recipe, _ = read_recipe(recipe_path(RECIPE), words)
    if not isinstance(recipe, MultimodalRecipe):
        raise ConfigError(f"bench packing trains the recipe {RECIPE}: leave kind as it is")
    with (
        Report(json_path, seconds or (300.0 if device.type == "cuda" else 120.0)) as report,
        tempfile.TemporaryDirectory() as folder,
    ):
        report.update({"device": device_name(device), "torch": torch.__version__, "overrides": words})
        measure(report, MultimodalTraining(recipe, RunFolder.open(folder), device), device)
    return report.found


def measure(report: Report, training: MultimodalTraining, device: torch.device) -> None:
    """Measure both streams in turn, after two warm-up rounds."""
    train_step, recipe = TrainStep(training, training.recipe.loop), training.recipe
    report["rows"], report["length"] = recipe.packing.rows, recipe.packing.seq_len
    report["parameters"], report["active_parameters"] = training.omni.count_parameters()
    count = BATCHES[device.type]
    streams = {"packed": _packed(training, count), "dense_text": Stream(dense_text(training, count))}
    for name, stream in streams.items():
        report.later(name, partial(_figures, stream, training.tokens_per_step))
    report.later("ratio", lambda: speed_ratio(report.found["packed"], report.found["dense_text"]))
    report["goal"] = GOAL
    number = itertools.count(1)
    candidates = {name: partial(stream.step, train_step, number) for name, stream in streams.items()}
    timings = {name: stream.timing for name, stream in streams.items()}
    training.model.train()
    alternate(candidates, 1, 2, report.deadline, device)
    known = _compilations(training)
    report.later("recompilations", lambda: _compilations(training) - known)
    for stream in streams.values():
        stream.tokens.clear()
    alternate(candidates, 4 * count, 0, report.deadline, device, timings)


def _packed(training: MultimodalTraining, count: int) -> Stream:
    """Return the first batches of the mixture, as in training."""
    batches, made, seconds = training.batches(), [], []
    for _ in range(count):
        began = time.perf_counter()
        made.append(next(batches))
        seconds.append(time.perf_counter() - began)
    return Stream(made, making=seconds)


def dense_text(training: MultimodalTraining, count: int) -> list[Batch]:
    """Return batches of causal rows of text without padding, with a loss on every token."""
    rows, length = training.recipe.packing.rows, training.recipe.packing.seq_len
    text = training.modalities["text"]
    assert isinstance(text, Text)
    sources = open_sources({name: EmbeddedConfig(name=name) for name in TEXTS}, "train")
    tokens = itertools.chain.from_iterable(map(text.encode, itertools.cycle(_words(sources.values()))))
    made = []
    for _ in range(count):
        written = [text.target_of(list(itertools.islice(tokens, length - 1))) for _ in range(rows)]
        made.append(collate([[build_sequence([segment])] for segment in written], length))
    return made


def _words(sources: Iterable[Source]) -> list[str]:
    """Return all texts of the sources, in order."""
    return [
        text
        for source in sources
        for index in range(len(source))
        if (text := source[index].get("text_en") or source[index].get("text_zh"))
    ]


def _figures(stream: Stream, positions: int) -> dict[str, Any] | None:
    """Return real tokens per second (median over steps) and statistics of the rows."""
    seconds = stream.timing.seconds
    if not seconds:
        return None
    rates = [tokens / one for tokens, one in zip(stream.tokens, seconds, strict=False)]
    held = statistics.mean(batch.tokens for batch in stream.batches)
    learned = sum(float((kind.weight > 0).sum()) for batch in stream.batches for kind in batch.groups.values())
    found = {
        "tokens_per_second": round(statistics.median(rates), 1),
        "quartiles": [round(rate, 1) for rate in _quartiles(rates)],
        "step_seconds": stream.timing.summary(),
        "padding": round(1 - held / positions, 4),
        "examples_per_row": round(statistics.mean(_examples_per_row(batch) for batch in stream.batches), 2),
        "learned": round(learned / sum(batch.tokens for batch in stream.batches), 3),
    }
    return found | ({"seconds_to_make_a_batch": statistics.median(stream.making)} if stream.making else {})


def _examples_per_row(batch: Batch) -> float:
    return batch.num_examples / batch.meta.batch


def _quartiles(rates: list[float]) -> list[float]:
    return statistics.quantiles(rates, n=4)[::2] if len(rates) > 1 else [rates[0], rates[0]]


def _compilations(training: MultimodalTraining) -> int:
    """Return the number of graphs compiled for the blocks so far."""
    executor = training.omni.backbone.executor
    executor = executor.inner if isinstance(executor, CheckpointedExecutor) else executor
    return executor.compilations if isinstance(executor, CompiledExecutor) else 0
