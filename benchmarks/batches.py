"""Benchmark `batches`: the time of one core to make batches of the demo, while caches fill and afterwards."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.harness import Json, Report, Seconds
from openm6.core.run_folder import RunFolder
from openm6.modalities.audio import SPEEDS, Audio
from openm6.modalities.batch import Batch
from openm6.modalities.image import Image
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import read_recipe, recipe_path

Each = Annotated[int, typer.Option("--each", min=1, help="Batches per entry.")]
Entries = Annotated[int, typer.Option("--entries", min=1, help="Entries.")]
Full = Annotated[bool, typer.Option("--full/--not-full", help="Also measure batches with all codes in the caches.")]


def bench_batches(
    each: Each = 100, entries: Entries = 6, seconds: Seconds = 240.0, json_path: Json = None, full: Full = True
) -> None:
    """Measure the processor time of batches in milliseconds per 1,024 tokens, in one thread.

    The last figure is that of batches whose images and recordings all have codes, at every speed.

    \b
    Example: python -m benchmarks batches --json batches.json
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: list[float] = []
    try:
        with Report(json_path, seconds) as report, tempfile.TemporaryDirectory() as folder:
            report.update({"batches_per_entry": each, "ms_per_1024_tokens": times})
            training = _training(Path(folder))
            batches = training.batches()
            while len(times) < entries and not (times and report.deadline.passed):
                times.append(_milliseconds(batches, each))
            if full and not report.deadline.passed:
                _encode_all(training)
                report.update({"all_codes_known": _milliseconds(batches, each)})
    finally:
        torch.set_num_threads(threads)


def _milliseconds(batches: Iterator[Batch], count: int) -> float:
    began, tokens = time.process_time(), sum(next(batches).tokens for _ in range(count))
    return round(1000 * (time.process_time() - began) / tokens * 1024, 1)


def _encode_all(training: MultimodalTraining) -> None:
    """Fill the caches of codes, which takes training some 15 epochs."""
    image, audio = training.modalities["image"], training.modalities["audio"]
    assert isinstance(image, Image) and isinstance(audio, Audio)
    for source in {id(x.source): x.source for x in training.packer.sampler.components}.values():
        for index in range(len(source)):
            record = source[index]
            if "image" in record:
                image.encode(record["image"])
            for speed in SPEEDS if "audio" in record else ():
                audio.encode(record["audio"], speed=speed)


def _training(folder: Path) -> MultimodalTraining:
    recipe, _ = read_recipe(recipe_path("demo"), [])
    assert isinstance(recipe, MultimodalRecipe)
    return MultimodalTraining(recipe, RunFolder.open(folder), torch.device("cpu"))
