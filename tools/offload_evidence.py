"""The runs of docs/offloading.md: precision relative to fp32 AdamW, and Pseudo-to-Real relative to real training.

Seconds are CPU time, so they are comparable on a machine with other load. An existing file of the same settings is
continued; `--runs` limits the number of further runs.

python tools/offload_evidence.py tiers --seeds 3 --json tiers.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from openm6.core.config import build
from openm6.core.run_folder import RunFolder
from openm6.data.mixture import Component, MixtureSampler
from openm6.data.packing import Packer
from openm6.data.prepare import ExampleTransform
from openm6.data.quarantine import Quarantine
from openm6.data.sources import open_sources
from openm6.modalities.batch import Batch
from openm6.optim.config import PRECISION_OF_BYTES
from openm6.train.multimodal import MultimodalTraining
from openm6.train.offloaded import open_train_step
from openm6.train.recipe import MultimodalRecipe

HELD_OUT = 12  # batches of test records of the mean loss
POINTS = 10  # of a run's curve
Values = dict[str, Any]

CASES: dict[str, dict[str, Values]] = {
    "tiers": {f"{size} bytes": {"bytes": size} for size in (16, 4, 2, 1)},
    "stages": {
        "real from the start": {},
        "real, three quarters of the steps": {"fraction": 0.75},
        "real, half of the steps": {"fraction": 0.5},
        "switch after 25 %": {"switch": 0.25},
        "switch after 50 %": {"switch": 0.5},
        "switch after 75 %": {"switch": 0.75},
        "pseudo to the end": {"switch": 1.0},
    },
    "moments": {name: {"switch": 0.5, "moments": name} for name in ("independent", "aligned", "reset")},
}


@dataclass(frozen=True)
class Setting:
    """Settings of all runs of a table; the hidden size is that of the nano preset's four layers."""

    hidden_size: int
    steps: int
    learning_rate: float
    batch_size: int
    seq_len: int


def recipe_of(case: Values, seed: int, setting: Setting, tokenizer: str | None) -> MultimodalRecipe:
    """Four layers of eight experts on English definitions and Chinese verse."""
    overrides: Values = {
        "hidden_size": setting.hidden_size,
        "experts": {"intermediate_size": setting.hidden_size},
    }
    overrides |= {"num_heads": setting.hidden_size // 32, "num_kv_heads": 1, "head_dim": 32}
    overrides |= {"sharing": "all"} if "switch" in case else {}
    steps = setting.steps
    values: Values = {
        "model": {"preset": "nano", "overrides": overrides},
        "modalities": {"text": {"vocab_size": 1024, "tokenizer": tokenizer}},
        "sources": {name: {"kind": "embedded", "name": name} for name in ("wordnet_en", "poems_zh")},
        "mixture": [
            {"source": "wordnet_en", "task": "reverse_dictionary", "weight": 2},
            {"source": "poems_zh", "task": "text_generation", "weight": 1},
        ],
        "packing": {"batch_size": setting.batch_size, "seq_len": setting.seq_len},
        "loop": {
            "steps": steps,
            "seed": seed,
            "offload": {},
            "optimizer": {
                "learning_rate": setting.learning_rate,
                "precision": PRECISION_OF_BYTES[case.get("bytes", 16)],
            },
            "schedule": {"warmup_steps": steps // 10, "decay_fraction": 0.4},
        },
    }
    return build(MultimodalRecipe, values, "the evidence")


def held_out(training: MultimodalTraining, folder: RunFolder) -> Iterator[Batch]:
    """Batches of test records, always the same."""
    sources = open_sources(training.recipe.sources, "test")
    parts = [
        Component(source=sources[component.source], task=component.task, weight=component.weight)
        for component in training.recipe.mixture
    ]
    transform = ExampleTransform(MixtureSampler(parts, 1), training.modalities, 1, {})
    return Packer(transform, training.recipe.packing, Quarantine(folder.quarantine, 1.0)).batches()


@torch.no_grad()
def mean_nll(training: MultimodalTraining, batches: list[Batch]) -> float:
    """Nats per token on the held-out batches."""
    training.model.eval()
    parts = [part.nll for batch in batches for part in training.omni.compute_loss(batch)[0].values()]
    training.model.train()
    return float(torch.cat(parts).mean())


def run_case(case: Values, seed: int, setting: Setting, tokenizer: str | None = None) -> Values:
    """One run: its loss at ten points, its CPU seconds before and after the switch, and the bytes of its blocks."""
    setting = replace(setting, steps=round(setting.steps * case.get("fraction", 1)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder.open(temporary)
        recipe = recipe_of(case, seed, setting, tokenizer)
        training = MultimodalTraining(recipe, folder, torch.device("cpu"))
        train_step = open_train_step(training, recipe.loop)
        test = list(islice(held_out(training, folder), HELD_OUT))
        run = Run(case, train_step, round(case.get("switch", 0) * setting.steps), setting.steps)
        batches, curve = training.batches(), []
        for step in range(1, setting.steps + 1):
            run.step(next(batches), step)
            if step * POINTS % setting.steps < POINTS:
                curve.append((step, sum(run.seconds), mean_nll(training, test)))
        return {"loss": curve[-1][2], "seconds": run.seconds, "set_bytes": run.kept, "curve": curve}


class Run:
    """Steps of one case, with the switch at its step and the CPU time of each stage."""

    def __init__(self, case: Values, train_step: Any, switch: int, steps: int) -> None:
        self._case, self._train_step, self._switch, self._steps = case, train_step, switch, steps
        self.seconds, self.kept = [0.0, 0.0], [self._bytes()]

    def _bytes(self) -> int:
        return sum(stored.numel() for stored in self._train_step.store.storage)

    def step(self, batch: Batch, step: int) -> None:
        switch, began = self._switch, time.process_time()
        if switch and step == switch + 1:
            self._train_step.delink(self._case.get("moments", "independent"))
            self.kept.append(self._bytes())
        self._train_step.lr_scale = min(1.0, (step - switch) / 10) if switch and step > switch else 1.0
        self._train_step.update(batch, step, self._steps)
        self.seconds[step > switch] += time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--runs", type=int, default=None, help="maximum number of runs in this call")
    parser.add_argument("--json", type=Path, required=True)
    words = parser.parse_args()
    setting = Setting(words.hidden_size, words.steps, words.learning_rate, words.batch_size, words.seq_len)
    found = earlier_runs(words.json, words.what, setting)
    with tempfile.TemporaryDirectory() as temporary:
        first = MultimodalTraining(recipe_of({}, 0, setting, None), RunFolder.open(temporary), torch.device("cpu"))
        tokenizer = Path(temporary) / "words.json"
        tokenizer.write_text(first.tokenizer, encoding="utf-8")
        run_all(words, setting, str(tokenizer), found)
    return 0


def earlier_runs(path: Path, what: str, setting: Setting) -> dict[str, list[Values]]:
    """Return the runs of each case in a file; none if there is no file."""
    found: dict[str, list[Values]] = {name: [] for name in CASES[what]}
    if not path.exists():
        return found
    content = json.loads(path.read_text(encoding="utf-8"))
    expected = facts_of(setting)
    if {name: content.get(name) for name in expected} != expected or set(content["runs"]) != set(found):
        sys.exit(f"{path} is of other settings: name another file")
    return content["runs"]


def facts_of(setting: Setting) -> Values:
    """Return what must be equal for runs to be compared."""
    return {**asdict(setting), "threads": torch.get_num_threads()}


def run_all(words: argparse.Namespace, setting: Setting, tokenizer: str, found: dict[str, list[Values]]) -> None:
    """Run every case with every seed that is missing; write the file after each run."""
    order = [(seed, name) for seed in range(words.seeds) for name in CASES[words.what]]
    missing = [(seed, name) for seed, name in order if len(found[name]) <= seed]
    for seed, name in missing[: words.runs]:
        found[name].append(run_case(CASES[words.what][name], seed, setting, tokenizer))
        losses = [run["loss"] for run in found[name]]
        spent = sum(found[name][-1]["seconds"])
        sys.stdout.write(f"{name} seed {seed}: {losses[-1]:.4f} in {spent:.0f} s, mean {statistics.mean(losses):.4f}\n")
        sys.stdout.flush()
        words.json.write_text(json.dumps({**facts_of(setting), "runs": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
