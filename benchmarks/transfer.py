"""Benchmark `transfer`: fine-tuning a model to a small data set, against training from nothing in as many steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.harness import Json, Report
from benchmarks.multitask import (
    LIMIT,
    Keep,
    Pairs,
    Plot,
    Seeds,
    Tables,
    add_pair,
    check_files,
    name_of,
    summary,
    train,
    working_folder,
)
from openm6.checkpoint.folder import latest
from openm6.core.config import apply_overrides
from openm6.core.errors import ConfigError
from openm6.data.inspect import inspect_path
from openm6.hub.find import find_model
from openm6.inference.load import read_texts

NOTHING, TUNED = "from nothing", "fine-tuned"


def bench_transfer(
    start: Annotated[str, typer.Option("--start", metavar="RUN", help="Model that is trained further.")],
    data: Annotated[str, typer.Option("--data", metavar="PATH", help="Table or folder, as of openm6 data inspect.")],
    target: Annotated[str | None, typer.Option("--target", help="Column to predict; default: all that fit.")] = None,
    steps: Annotated[str, typer.Option("--steps", metavar="N,N", help="Numbers of steps to compare at.")] = "50,200",
    seeds: Seeds = 3,
    image: Plot = None,
    table: Tables = None,
    keep: Keep = None,
    json_path: Json = None,
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Of the recipe.")] = None,
) -> dict[str, Any]:
    """Train a model of the same shape on the same data, once from the weights of a run, and once from new ones.

    The recipe is that of `openm6 data inspect`. Both are evaluated on the same test records.

    \b
    Example: python -m benchmarks transfer --start runs/demo --data penguins.csv --target species --steps 50,200
    """
    lengths = read_steps(steps)
    tuned, scratch = (apply_overrides(values, settings or []) for values in recipes(start, data, target))
    check_files(image, table)
    runs: list[dict[str, Any]] = []
    pairs: dict[tuple[str, str], Pairs] = {}
    with working_folder(keep) as folder, Report(json_path, LIMIT) as report:
        report.update({"start": start, "data": data, "steps": lengths, "seeds": seeds, "runs": runs})
        report.at_end(lambda: summary(pairs, f"model {NOTHING}", f"{TUNED} model", image, table))
        for seed in range(seeds):
            for length in lengths:
                kind, limit = f"{length} steps", {"steps": length}
                from_nothing = train(f"{NOTHING}, {kind}", scratch, scratch["mixture"], limit, seed, folder)
                runs.append(from_nothing.to_json())
                further = train(f"{TUNED}, {kind}", tuned, tuned["mixture"], limit, seed, folder)
                runs.append(further.to_json())
                for component in tuned["mixture"]:
                    add_pair(pairs, name_of(component), kind, from_nothing.scores, further.scores)
    return report.found


def read_steps(text: str) -> list[int]:
    """Return numbers of steps in order; ConfigError if one is no number above 0."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) for word in words):
        raise ConfigError(f"--steps {text!r} is no list of numbers such as 50,200")
    return sorted({int(word) for word in words})


def recipes(start: str, data: str, target: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipe that is proposed for the data: from the start, and from nothing with the start's shape."""
    tuned = dict(yaml.safe_load(inspect_path(data, 1.0, target, start).usable_recipe()))
    description, _ = read_texts(latest(find_model(Path(start) if Path(start).exists() else start)))
    overrides = {**description.backbone.model_dump(mode="json"), "lora": None}
    shape = {"preset": description.preset or "nano", "overrides": overrides}
    modalities = description.modalities.model_dump(mode="json")
    for section, given in (tuned.get("modalities") or {}).items():
        modalities[section] = {**modalities[section], **given}
    return tuned, {**tuned, "model": shape, "modalities": modalities}
