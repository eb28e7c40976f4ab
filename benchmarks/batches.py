"""Benchmark `batches`: the time of one core to make batches of the demo, while its caches fill."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import Json, Report, Seconds
from openm6.core.run_folder import RunFolder
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import read_recipe, recipe_path

Each = Annotated[int, typer.Option("--each", min=1, help="Batches per entry.")]
Entries = Annotated[int, typer.Option("--entries", min=1, help="Entries.")]


def bench_batches(each: Each = 100, entries: Entries = 6, seconds: Seconds = 240.0, json_path: Json = None) -> None:
    """Measure the processor time of batches in milliseconds per 1,024 tokens, in one thread.

    \b
    Example: python -m benchmarks batches --json batches.json
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: list[float] = []
    try:
        with Report(json_path, seconds) as report, tempfile.TemporaryDirectory() as folder:
            report.update({"batches_per_entry": each, "ms_per_1024_tokens": times})
            batches = _training(Path(folder)).batches()
            while len(times) < entries and not (times and report.deadline.passed):
                began, tokens = time.process_time(), sum(next(batches).tokens for _ in range(each))
                times.append(round(1000 * (time.process_time() - began) / tokens * 1024, 1))
    finally:
        torch.set_num_threads(threads)


def _training(folder: Path) -> Any:
    recipe, _ = read_recipe(recipe_path("demo"), [])
    assert isinstance(recipe, MultimodalRecipe)
    return MultimodalTraining(recipe, RunFolder.open(folder), torch.device("cpu"))
