"""A short training run whose time and memory are measured and whose model is then forgotten."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from openm6.base.errors import TrainingError
from openm6.base.run_folder import RunFolder
from openm6.train.loop import train
from openm6.train.multimodal import MultimodalJob
from openm6.train.recipe import MultimodalRecipe
from openm6.train.recorder import read_metrics
from openm6.train.run import read_recipe, recipe_path

RECIPE = "demo"
MIXTURE = (
    "{source: questions, task: answer}, {source: wordnet, task: define}, {source: poems, task: continue}"
)
TEXT_ONLY = f"mixture=[{MIXTURE}]"
WARMING = 3  # steps that fill caches
ALWAYS = [
    "loop.minutes=null", "loop.log_every=1", "loop.save_every=100000", "loop.tensorboard=false",
    "loop.schedule.warmup_steps=2",
]  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """What a short run took: seconds of a step that nothing disturbed (the fastest quarter of them are faster), joules
    of a step on average, bytes at most, processes that shared a step.
    """

    seconds: float
    joules: float
    memory: float
    workers: int


class ProbeJob(MultimodalJob):
    """Trains and is not judged."""

    def finish(self, run: RunFolder) -> None:
        pass


def run_probe(overrides: list[str], steps: int, folder: Path | None = None) -> Probe:
    """Trains the demo's recipe with `overrides` for a few steps, in a process of its own.

    Raises:
        TrainingError: the process failed; the sentence is its own.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        words = [str(place), *overrides, f"loop.steps={steps}", *ALWAYS]
        done = subprocess.run(
            [sys.executable, "-m", "openm6.bench.probe", *words], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise TrainingError(f"a probe run failed: {done.stderr.strip().splitlines()[-1:]}")
        return read_probe(RunFolder(place))


def read_probe(run: RunFolder) -> Probe:
    """The figures of a run that wrote a line after every step."""
    lines = [line for line in read_metrics(run) if "seconds" in line]
    pairs = list(pairwise(lines[WARMING:]))
    seconds = [after["seconds"] - before["seconds"] for before, after in pairs]
    joules = [after["joules"] - before["joules"] for before, after in pairs]
    workers = (run.read_config().get("loop") or {}).get("workers")
    return Probe(
        statistics.quantiles(seconds, n=4)[0],
        statistics.mean(joules),
        float(lines[-1]["memory_peak"]),
        workers if isinstance(workers, int) else 1,
    )


def main(words: list[str]) -> None:
    """Trains into the folder of the first word with the settings of the others."""
    folder, overrides = words[0], words[1:]
    checked, values = read_recipe(recipe_path(RECIPE), overrides)
    assert isinstance(checked, MultimodalRecipe)
    run = RunFolder.open(folder)
    run.write_config(values)
    train(ProbeJob(checked, run, torch.device("cpu")), checked.loop, run)


if __name__ == "__main__":
    main(sys.argv[1:])
