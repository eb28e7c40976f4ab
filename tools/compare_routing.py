"""Compare top-k experts and prototypes under three kinds of balancing, by training a small model with each.

python tools/compare_routing.py --out runs/routing
python tools/compare_routing.py --out runs/routing --data my/data --steps 400 --seeds 3 loop.num_processes=1

All runs of a seed have the same initial weights and the same tokens in the same order. Results are written to
OUT/routing.json after every run; a second call continues where the first stopped.
"""

# Shapes: L layers

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openm6.core.config import apply_overrides, build, read_yaml
from openm6.core.device import resolve_device
from openm6.core.errors import ConfigError, OpenM6Error
from openm6.core.files import replace_text
from openm6.core.run_folder import RunFolder
from openm6.data.parquet import ParquetConfig
from openm6.data.sources import open_sources
from openm6.tasks.registry import TASKS
from openm6.train.callbacks import HELD_OUT_PREFIX
from openm6.train.loop import train
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import recipe_path

Values = dict[str, Any]
ROUTINGS = ("top_k", "prototypes")
BALANCES = ("aux", "bias", "none")
REFERENCE = "top_k/bias"  # what the presets use
TEXT_TASKS = ("text_generation", "text_denoising")
IMAGE_TASKS = ("image_captioning", "visual_question_answering", "text_to_image")
LOOKED_AT = 200  # records of a source, nearly all of which must hold what a task needs
NEARLY_ALL = 0.98
ENDING = 0.2  # part of a run whose loads are averaged


class ComparedTraining(MultimodalTraining):
    """A training without an evaluation at its end, because only its held-out loss is needed."""

    def finish(self, run: RunFolder) -> None:
        pass


def folder_data(folder: Path) -> tuple[Values, list[Values]]:
    """Sources and mixture of a folder of NAME-train.parquet and NAME-test.parquet: those of text and images.

    Every source has the same weight, divided among the tasks that suit its records.

    Raises:
        ConfigError: no file there suits.
    """
    sources: Values = {}
    mixture: list[Values] = []
    for path in sorted(folder.glob("*-train.parquet")):
        name = path.name.removesuffix("-train.parquet")
        test = path.with_name(f"{name}-test.parquet")
        source = ParquetConfig(path=str(path), test_path=str(test) if test.is_file() else None)
        tasks = _suitable_tasks(name, source)
        if tasks:
            sources[name] = source.model_dump(exclude_defaults=True) | {"kind": "parquet"}
            mixture += [{"source": name, "task": task, "weight": 1 / len(tasks)} for task in tasks]
    if not mixture:
        raise ConfigError(f"{folder} holds no NAME-train.parquet with texts or images: check --data")
    return sources, mixture


def _suitable_tasks(name: str, config: ParquetConfig) -> list[str]:
    source = open_sources({name: config}, "train")[name]
    step = max(1, len(source) // LOOKED_AT)
    records = [source[index] for index in range(0, len(source), step)]
    if any("audio" in record for record in records):
        return []
    tried = IMAGE_TASKS if any("image" in record for record in records) else TEXT_TASKS
    suits = {task: sum(bool(TASKS[task].languages(record)) for record in records) for task in tried}
    return [task for task, count in suits.items() if count >= NEARLY_ALL * len(records)]


def with_routing(values: Values, cell: str, seed: int) -> Values:
    """The recipe's values with the routing and balance of a cell such as `prototypes/aux`, and a seed."""
    routing, balance = cell.split("/")
    experts = values["model"]["overrides"]["experts"]
    choices = experts["top_k"]
    chosen = {"top_k": choices} if routing == "top_k" else {"top_k": None, "num_prototypes": choices}
    overrides = values["model"]["overrides"] | {"experts": {**experts, **chosen, "balance": balance}}
    return {
        **values,
        "model": {**values["model"], "overrides": overrides},
        "loop": {**values["loop"], "seed": seed},
    }


def run_cell(values: Values, folder: Path) -> Values:
    """Train or resume one run, and return its curves."""
    recipe = build(MultimodalRecipe, values, "the recipe")
    run = RunFolder.open(folder)
    run.write_config(values)
    device = resolve_device()
    result = train(ComparedTraining(recipe, run, device), recipe.loop, run, resume=True)
    return {"tokens": result.tokens, "seconds": round(result.seconds, 1), **curves(run)}


def curves(run: RunFolder) -> Values:
    """Held-out and training losses by step, and each layer's expert load CV at the end and on the way."""
    lines = run.read_metrics()
    held_out = [
        {"step": line["step"], "tokens": line["tokens"]}
        | {
            key.removeprefix(HELD_OUT_PREFIX): round(value, 5)
            for key, value in line.items()
            if key.startswith(HELD_OUT_PREFIX)
        }
        for line in lines
        if f"{HELD_OUT_PREFIX}loss" in line
    ]
    last = lines[-max(1, round(ENDING * len(lines))) :]
    return {
        "held_out": held_out,
        "train": [[line["step"], round(line["loss"], 5)] for line in lines],
        "expert_load_cv": [[line["step"], *(round(value, 3) for value in line["expert_load_cv"])] for line in lines],
        "expert_load_cv_at_end": [
            round(statistics.mean(layer), 3) for layer in zip(*(x["expert_load_cv"] for x in last), strict=True)
        ],
    }


def summarise(runs: Sequence[Values]) -> Values:
    """Each cell over its seeds: held-out losses at the end, and how they differ from the reference of the same seed."""
    reference = {run["seed"]: run["held_out"][-1] for run in runs if run["cell"] == REFERENCE}
    found: Values = {}
    for cell in dict.fromkeys(run["cell"] for run in runs):
        own = [run for run in runs if run["cell"] == cell]
        paired = [run for run in own if run["seed"] in reference]
        kinds = [key for key in own[0]["held_out"][-1] if key not in ("step", "tokens")]
        found[cell] = {
            "seeds": [run["seed"] for run in own],
            "held_out": {kind: _summary([run["held_out"][-1][kind] for run in own]) for kind in kinds},
            f"minus_{REFERENCE}": {
                kind: _summary([run["held_out"][-1][kind] - reference[run["seed"]][kind] for run in paired])
                for kind in kinds
                if paired
            },
            "expert_load_cv_at_end": [
                round(statistics.mean(layer), 3)
                for layer in zip(*(run["expert_load_cv_at_end"] for run in own), strict=True)
            ],
        }
    return found


def _summary(numbers: Sequence[float]) -> Values:
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {
        "mean": round(statistics.mean(numbers), 4),
        "deviation": None if deviation is None else round(deviation, 4),
        "values": [round(number, 4) for number in numbers],
    }


def compare(values: Values, cells: Sequence[str], seeds: int, out: Path) -> Values:
    """All runs, seed by seed, so that what is there after a stop compares all cells.

    Raises:
        ConfigError: OUT holds results of another recipe.
    """
    path = out / "routing.json"
    report: Values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": []}
    plain = json.loads(json.dumps(values, default=str))
    if report.setdefault("recipe", plain) != plain:
        raise ConfigError(f"{path} is of another recipe or other data: choose another --out")
    report["machine"] = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    for seed in range(seeds):
        for cell in cells:
            if any((run["cell"], run["seed"]) == (cell, seed) for run in report["runs"]):
                continue
            found = run_cell(with_routing(values, cell, seed), out / f"{cell.replace('/', '-')}-{seed}")
            report["runs"].append({"cell": cell, "seed": seed, **found})
            report["summary"] = summarise(report["runs"])
            replace_text(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def read_cells(words: str) -> list[str]:
    """Cells from `top_k/aux,prototypes/none`; ConfigError where there is no such cell."""
    known = [f"{routing}/{balance}" for routing in ROUTINGS for balance in BALANCES]
    cells = words.split(",") if words else known
    for cell in cells:
        if cell not in known:
            raise ConfigError(f"no cell {cell!r}: choose from {', '.join(known)}")
    return cells


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/routing"), help="folder of the runs and results")
    parser.add_argument("--data", type=Path, help="folder of NAME-train.parquet; default: the recipe's sources")
    parser.add_argument("--recipe", default="routing", help="a recipe that sets experts with a top_k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each run; default: the recipe's")
    parser.add_argument("--cells", default="", metavar="ROUTING/BALANCE,…", help="default: all six")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe, as loop.num_processes=1")
    arguments = parser.parse_args(words)
    values = apply_overrides(read_yaml(recipe_path(arguments.recipe)), arguments.overrides)
    if arguments.steps:
        values["loop"]["steps"] = arguments.steps
    if arguments.data:
        values["sources"], values["mixture"] = folder_data(arguments.data)
    report = compare(values, read_cells(arguments.cells), arguments.seeds, arguments.out)
    sys.stdout.write(json.dumps(report["summary"], indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OpenM6Error as error:
        sys.exit(str(error))
