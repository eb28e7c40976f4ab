"""Benchmark `multitask`: one generalist against specialists of equal size, at equal examples and equal total time."""

# Letters: S seeds

from __future__ import annotations

import shutil
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import t as student

from benchmarks.harness import Json, Report
from openm6.checkpoint.folder import read_state
from openm6.core.config import build
from openm6.core.errors import ConfigError, Interrupted, nearest
from openm6.core.files import check_writable, replace_text
from openm6.core.run_folder import RunFolder
from openm6.evaluate.evaluator import LEAST
from openm6.evaluate.formatting import plain, words
from openm6.evaluate.run import evaluate
from openm6.optim.config import ScheduleConfig
from openm6.train.run import read_recipe, recipe_path, train_values

LIMIT = 24 * 3600.0  # seconds; the whole comparison takes hours
GENERALIST = "generalist"
EXAMPLES, TIME = "equal examples", "equal time"
WARMUP = 0.2  # of a short run, at most
COVERAGE = 0.95

Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Repetitions, each with another seed.")]
Plot = Annotated[Path | None, typer.Option("--image", metavar="FILE", help="Draw the differences: .png, .svg or .pdf.")]
Tables = Annotated[Path | None, typer.Option("--table", metavar="FILE", help="Also write the table to this file.")]
Keep = Annotated[Path | None, typer.Option("--keep", metavar="DIR", help="Keep the runs in this folder.")]


@dataclass(frozen=True)
class Score:
    """The first metric of one task in one evaluation."""

    metric: str
    better: str
    value: float


@dataclass(frozen=True)
class Trained:
    """A run: what it was trained on and how long, and its scores by task and source."""

    label: str
    seed: int
    folder: Path
    steps: int
    tokens: int
    seconds: float
    examples: dict[str, int]
    scores: dict[str, Score]

    def to_json(self) -> dict[str, Any]:
        """The entry of the run in the report."""
        scores = {name: one.value for name, one in self.scores.items()}
        facts = {"steps": self.steps, "tokens": self.tokens, "seconds": round(self.seconds, 1)}
        return {"run": self.label, "seed": self.seed, **facts, "examples": self.examples, "scores": scores}


@dataclass
class Pairs:
    """Values of one task in two kinds of run, by seed."""

    title: str
    kind: str
    metric: str
    better: str
    values: list[tuple[float, float]] = field(default_factory=list)  # first the one that is compared with

    def row(self) -> dict[str, Any]:
        """Means, and the advantage of the second with its interval over seeds, None for one seed."""
        first, second = (statistics.fmean(side) for side in zip(*self.values, strict=True))
        sign = 1 if self.better == "higher" else -1
        advantages = [sign * (after - before) for before, after in self.values]
        return {
            "task": self.title, "kind": self.kind, "metric": self.metric, "better": self.better,
            "reference": first, "value": second, "advantage": statistics.fmean(advantages),
            "interval": seed_interval(advantages), "seeds": len(self.values),
        }  # fmt: skip


def bench_multitask(
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe of the generalist.")] = "demo",
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Tasks of its mixture, as task or task/source.")
    ] = None,
    seeds: Seeds = 3,
    minutes: Annotated[float, typer.Option("--minutes", min=0.01, help="Training of the generalist.")] = 5.6,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps of the generalist instead.")] = None,
    image: Plot = None,
    table: Tables = None,
    keep: Keep = None,
    json_path: Json = None,
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Of the recipe.")] = None,
) -> dict[str, Any]:
    """Train one model on all tasks, and one of the same size on each task alone; compare them on the same records.

    For each seed, the generalist is trained first. Then each task has two specialists: one is trained on as many
    examples of its task as the generalist, the other for the total time divided by the number of tasks.

    \b
    Example: python -m benchmarks multitask --minutes 5.6 --seeds 3 --image multitask.png --json multitask.json
    """
    _, values = read_recipe(recipe_path(recipe), settings or [])
    mixture = choose(values["mixture"], tasks)
    check_files(image, table)
    runs: list[dict[str, Any]] = []
    pairs: dict[tuple[str, str], Pairs] = {}
    whole: dict[str, Any] = {"minutes": minutes} if steps is None else {"steps": steps}
    part = {name: one / len(mixture) for name, one in whole.items()}
    with working_folder(keep) as folder, Report(json_path, LIMIT) as report:
        report.update({"recipe": recipe, "tasks": list(map(name_of, mixture)), "seeds": seeds, **whole, "runs": runs})
        report.at_end(lambda: summary(pairs, "specialist", GENERALIST, image, table))
        for seed in range(seeds):
            general = train(GENERALIST, values, mixture, whole, seed, folder)
            runs.append(general.to_json())
            for component in mixture:
                name, length = name_of(component), {"steps": general.steps / len(mixture), **part}
                for kind in (TIME, EXAMPLES):
                    special = train(f"{name}, {kind}", values, [component], length, seed, folder)
                    runs.append(special.to_json())
                    add_pair(pairs, name, kind, special.scores, general.scores)
                    length = {"steps": steps_for(general.examples[name], special)}
    return report.found


def name_of(component: Mapping[str, Any]) -> str:
    """Return the task and source of a component of a mixture."""
    return f"{component['task']}/{component['source']}"


def choose(mixture: Sequence[dict[str, Any]], tasks: str | None) -> list[dict[str, Any]]:
    """Return the chosen components; ConfigError for an unknown name, or fewer than two."""
    names = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    known = sorted({name for one in mixture for name in (one["task"], name_of(one))})
    for name in names or ():
        if name not in known:
            raise ConfigError(f"the mixture has no task {name!r}; {nearest(name, known)}")
    chosen = [one for one in mixture if names is None or {one["task"], name_of(one)} & set(names)]
    if len(chosen) < 2:
        raise ConfigError("a generalist has at least two tasks: name more in --tasks")
    return chosen


def check_files(image: Path | None, table: Path | None) -> None:
    """Raise an error before anything is trained if a file cannot be written, or the image not be drawn."""
    for path, option in ((image, "--image"), (table, "--table")):
        if path is not None:
            check_writable(path, option)
    if image is not None:
        new_figure(1)
        if image.suffix not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"--image {image}: end its name in .png, .svg or .pdf")


def new_figure(lines: int) -> Any:
    """Return an empty figure for so many tasks; ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional package
    except ImportError:
        raise ConfigError("--image needs matplotlib: pip install '.[report]'") from None
    return Figure(figsize=(8, 1.2 + 0.35 * lines), layout="constrained")


@contextmanager
def working_folder(keep: Path | None) -> Any:
    """A folder for runs, removed at the end unless it is to be kept."""
    folder = Path(tempfile.mkdtemp(prefix="openm6-multitask-")) if keep is None else keep
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def train(
    label: str, values: Mapping[str, Any], mixture: Sequence[dict[str, Any]], length: Mapping[str, Any], seed: int,
    folder: Path,
) -> Trained:  # fmt: skip
    """Train by a recipe with this mixture, for `steps` or `minutes`, and evaluate on the test records of its tasks."""
    sys.stderr.write(f"{label}, seed {seed}\n")
    path = folder / f"{label.replace('/', '-').replace(', ', '-').replace(' ', '-')}-{seed}"
    recipe = {**values, "mixture": list(mixture), "sources": needed_sources(values["sources"], mixture)}
    recipe["loop"] = loop_of(values.get("loop") or {}, length, seed)
    # The same records in all evaluations, whatever time they take.
    recipe["eval"] = {"at_end": False} | LEAST | {
        name: one for name, one in (values.get("eval") or {}).items() if one != "auto" and name != "at_end"
    }  # fmt: skip
    try:
        result = train_values(recipe, label, RunFolder(path))
    except Interrupted as error:
        # The loop took the signal: now the report takes it, and prints what there is.
        signal.raise_signal(error.exit_code - 128)
        raise
    examples = examples_taken(read_state(result.checkpoint)["progress"]["cursor"], mixture)
    scores = {one.name: Score(one.metric, one.better, one.value) for one in evaluate(path).results}
    return Trained(label, seed, path, result.steps, result.tokens, result.seconds, examples, scores)


def examples_taken(cursor: Mapping[str, Any], mixture: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many examples of each component were trained: those that were drawn and are not waiting for a row."""
    components = cursor["mixture"]["components"]
    waiting = Counter(one[0] for shard in cursor["shards"].values() for one in shard["buffer"])
    found = {}
    for index, one in enumerate(mixture):
        own = components[f"{one['source']}/{one['task']}"]
        found[name_of(one)] = own["epoch"] * own["length"] + own["offset"] - waiting[index]
    return found


def needed_sources(sources: Mapping[str, Any], mixture: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sources of a mixture, and those that its pairs are made of."""
    names = [one["source"] for one in mixture]
    # It grows, as pairs may be of pairs.
    for name in names:
        names += [sources[name][side] for side in ("left", "right") if side in sources[name]]
    return {name: sources[name] for name in sources if name in names}


def loop_of(loop: Mapping[str, Any], length: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the settings of the loop for a run of some steps or minutes, whose warm-up is no long part of it.

    With minutes, `steps` are those that they may have room for, if that is known. No run is stopped early.
    """
    replaced = ("steps", "minutes", "early_stopping_patience")
    found = {name: one for name, one in loop.items() if name not in replaced} | {"seed": seed}
    if "steps" in length:
        steps, schedule = max(1, round(length["steps"])), dict(loop.get("schedule") or {})
        warmup = min(build(ScheduleConfig, schedule, "loop.schedule").warmup_steps, int(WARMUP * steps))
        found |= {"steps": steps, "schedule": schedule | {"warmup_steps": warmup}}
    return found | ({"steps": "auto", "minutes": length["minutes"]} if "minutes" in length else {})


def steps_for(examples: int, timed: Trained) -> int:
    """Return the steps in which a run takes so many examples, by those that another one on the same task took."""
    return max(1, round(examples * timed.steps / max(1, sum(timed.examples.values()))))


def add_pair(
    pairs: dict[tuple[str, str], Pairs], name: str, kind: str, reference: Mapping[str, Score],
    scores: Mapping[str, Score],
) -> None:  # fmt: skip
    """Add the values of one task in two runs of one seed, if it was evaluated in both."""
    if name in reference and name in scores:
        first, second = reference[name], scores[name]
        own = pairs.setdefault((name, kind), Pairs(name, kind, first.metric, first.better))
        own.values.append((first.value, second.value))


def seed_interval(advantages: Sequence[float]) -> list[float] | None:
    """Return the 95 % interval of the mean over seeds by Student's t distribution; None for one seed."""
    if len(advantages) < 2:
        return None
    middle, error = statistics.fmean(advantages), statistics.stdev(advantages) / len(advantages) ** 0.5
    reach = float(student.ppf((1 + COVERAGE) / 2, len(advantages) - 1)) * error
    return [middle - reach, middle + reach]


def summary(
    pairs: Mapping[tuple[str, str], Pairs], reference: str, compared: str, image: Path | None, table: Path | None
) -> dict[str, Any]:
    """Print the table of all pairs so far, write and draw it, and return its rows for the JSON."""
    rows = [own.row() for own in pairs.values()]
    text = markdown(rows, reference, compared)
    sys.stderr.write(text)
    if table is not None:
        replace_text(table, text)
    if image is not None and rows:
        draw(rows, f"advantage of the {compared} over the {reference}", image)
    return {"comparison": rows}


def markdown(rows: Sequence[Mapping[str, Any]], reference: str, compared: str) -> str:
    """Return the rows as a table."""
    lines = [
        f"| task | at | metric | {reference} | {compared} | advantage (95 % interval over seeds) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        interval = row["interval"]
        between = "one seed" if interval is None else f"{plain(interval[0], 3)} to {plain(interval[1], 3)}"
        values = f"{plain(row['reference'], 3)} | {plain(row['value'], 3)} | {plain(row['advantage'], 3)} ({between})"
        lines.append(f"| {words(row['task'])} | {row['kind']} | {words(row['metric'])} | {values} |")
    return "\n".join(lines) + "\n"


def relative(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return advantage and interval as fractions: of a score from 0 to 1 as they are, of a loss relative to it."""
    scale = 1.0 if row["better"] == "higher" else max(abs(row["reference"]), 1e-9)
    low, high = row["interval"] or (row["advantage"], row["advantage"])
    return row["advantage"] / scale, low / scale, high / scale


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw the advantages as points with intervals, one line per task and one colour per kind."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure = new_figure(len(tasks))
    axes = figure.subplots()
    for number, kind in enumerate(kinds):
        own = [row for row in rows if row["kind"] == kind]
        found = 100 * np.array([relative(row) for row in own])
        heights = [tasks.index(row["task"]) + 0.2 * (number - (len(kinds) - 1) / 2) for row in own]
        reach = [found[:, 0] - found[:, 1], found[:, 2] - found[:, 0]]
        axes.errorbar(found[:, 0], heights, xerr=np.abs(reach), fmt="o", markersize=4, capsize=2, label=kind)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(tasks)), list(map(words, tasks)))
    axes.invert_yaxis()
    axes.set_xlabel("percentage points of accuracy or F1; of other metrics, per cent of the error")
    axes.set_title(title)
    axes.legend(frameon=False)
    figure.savefig(path)
