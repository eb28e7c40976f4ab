"""A short training run whose time, energy and memory are measured and whose model is then forgotten."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from openm6.base.energy.estimate import own_cpu_seconds
from openm6.base.errors import TrainingError
from openm6.base.run_folder import RunFolder
from openm6.bench.child import end_with_parent, run_child
from openm6.bench.quiet import machine_load
from openm6.train.hooks import Hook
from openm6.train.loop import train
from openm6.train.multimodal import MultimodalJob
from openm6.train.recipe import MultimodalRecipe
from openm6.train.recorder import read_metrics
from openm6.train.run import read_recipe, recipe_path

RECIPE = "demo"
MIXTURE = (
    "{source: questions, task: answer}, {source: wordnet, task: define}, {source: poems, task: continue}"
)
TEXT_ONLY = [
    f"mixture=[{MIXTURE}]",
    "sources.wordnet={kind: embedded, name: wordnet_en}",
    "sources.poems={kind: embedded, name: poems_zh}",
]
WARMING = 3  # steps that fill caches
LONGEST = 90.0  # seconds that a probe may take before it is given up
DISTURBED = 0.05  # share of the machine that others had, above which a measurement is marked
ALWAYS = [
    "loop.minutes=null", "loop.log_every=1", "loop.save_every=100000", "loop.tensorboard=false",
    "loop.schedule.warmup_steps=2",
]  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """What a short run took: seconds and joules of a step (medians), bytes at most, and what else the machine did.

    cpu: seconds of processors that a step took (mean); others: share of the machine that other processes or other
    guests of its host had meanwhile, None where the system does not tell; metering: share of the time that the energy
    meter took.
    """

    seconds: float
    joules: float
    memory: float
    cpu: float = 0.0
    others: float | None = None
    metering: float = 0.0

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED


class LoadHook(Hook):
    """Lines tell what this run and the whole machine did so far, in seconds of processors."""

    name = "load"

    def totals(self) -> dict[str, Any]:
        load = machine_load()
        found = {"own_cpu": own_cpu_seconds()}
        return found if load is None else found | {"busy_cpu": load.busy, "all_cpu": load.all}


class ProbeJob(MultimodalJob):
    """Trains and is not judged."""

    def recall(self, count: int) -> None:
        """Makes the first batches once: in a run of any length nearly all pictures and sounds were met before."""
        start = self.packer.state()
        for _ in islice(self.batches(), count):
            pass
        self.restore(start)

    def finish(self, run: RunFolder) -> None:
        pass


def run_probe(overrides: list[str], steps: int, folder: Path | None = None) -> Probe:
    """Trains the demo's recipe with `overrides` for a few steps, in a process of its own, which ends with this one.

    Raises:
        TrainingError: the process failed or hung; the sentence is its own.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        words = [str(place), *overrides, f"loop.steps={steps}", *ALWAYS]
        command = [sys.executable, "-m", "openm6.bench.probe", *words]
        try:
            done = run_child(command, LONGEST)
        except subprocess.TimeoutExpired:
            raise TrainingError(f"a probe run took more than {LONGEST:g} s: free the machine") from None
        if done.returncode:
            raise TrainingError(f"a probe run failed: {done.stderr.strip().splitlines()[-1:]}")
        return read_probe(RunFolder(place))


def read_probe(run: RunFolder) -> Probe:
    """The figures of a run that wrote a line after every step."""
    lines = [line for line in read_metrics(run) if "seconds" in line][WARMING:]

    def each(name: str) -> list[float]:
        return [after[name] - before[name] for before, after in pairwise(lines)]

    spent = sum(each("seconds"))
    others = None
    if "busy_cpu" in lines[0]:
        own, busy = sum(each("own_cpu")), sum(each("busy_cpu"))
        others = max(0.0, busy - own) / max(1e-9, sum(each("all_cpu")))
    return Probe(
        statistics.median(each("seconds")),
        statistics.mean(each("joules")),  # the meter looks now and then: a short step may have none
        float(lines[-1]["memory_peak"]),
        statistics.mean(each("own_cpu")) if "own_cpu" in lines[0] else 0.0,
        others,
        sum(each("metering_seconds")) / spent,
    )


def main(words: list[str]) -> None:
    """Trains into the folder of the first word with the settings of the others."""
    folder, overrides = words[0], words[1:]
    checked, values = read_recipe(recipe_path(RECIPE), overrides)
    assert isinstance(checked, MultimodalRecipe)
    run = RunFolder.open(folder)
    run.write_config(values)
    job = ProbeJob(checked, run, torch.device("cpu"))
    assert isinstance(checked.loop.steps, int)
    job.recall(checked.loop.steps + checked.loop.prefetch + 1)
    train(job, checked.loop, run, hooks=[LoadHook()])


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1:])
