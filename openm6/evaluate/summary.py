"""Results as text: a line of the log, a table in the terminal, and the model card README.md of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openm6.core.files import plain_data
from openm6.energy.carbon import GPT3_CAVEAT, in_joules
from openm6.evaluate.formatting import count, duration, signed, significance
from openm6.evaluate.metrics import metric_title, score
from openm6.evaluate.results import EvalReport, RunFacts, TaskResult
from openm6.tasks.registry import all_tasks

# Width in characters below which the table leaves columns out.
WIDE = 120
MAX_LISTED = 4  # tasks without answers to all records


def answered(result: TaskResult) -> str:
    """How many of the test records were answered: `60 of 372`, or `60` if all were."""
    total = result.records + result.left_out
    return str(total) if result.answered == total else f"{result.answered} of {total}"


def result_line(result: TaskResult) -> str:
    value, baseline = (score(result.metric, number) for number in (result.value, result.baseline))
    low, high = (score(result.metric, end) for end in result.value_interval)
    bits_low, bits_high = (signed(end) for end in result.information_interval)
    return (
        f"{result.name}: {metric_title(result.metric)} {value} [{low}, {high}], baseline {baseline}; information "
        f"{signed(result.information_gain)} bits [{bits_low}, {bits_high}]; {answered(result)} records answered"
    )


def print_table(report: EvalReport, console: Console) -> None:
    """One row per task; a narrow terminal shows neither modalities nor records. A name cut short could not be typed."""
    narrow = console.width < WIDE
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0) if narrow else (0, 1))
    table.add_column("task", overflow="fold", min_width=14)
    if not narrow:
        table.add_column("modalities", no_wrap=True)
    table.add_column("metric", min_width=7)
    last = [] if narrow else ["answered"]
    for name in ("value", "baseline", "information", "95 % interval", *last):
        table.add_column(name, justify="right", no_wrap=True)
    colours = {"positive": "green", "none": "yellow", "negative": "red"}
    for result in report.results:
        colour = "" if not math.isfinite(result.baseline) else "green" if result.beats_baseline else "red"
        bits = colours[significance(result.information_interval)]
        low, high = (signed(end) for end in result.information_interval)
        # Text, not str: rich would read square brackets in a name as its own markup.
        table.add_row(
            Text(result.name),
            *([] if narrow else [f"{result.input_modality} → {result.output_modality}"]),
            metric_title(result.metric),
            Text(score(result.metric, result.value), style=colour),
            score(result.metric, result.baseline),
            Text(signed(result.information_gain), style=bits),
            Text(f"{low} … {high}", style=bits),
            *([] if narrow else [answered(result)]),
        )
    console.print(table)
    significant = sum(result.uses_inputs for result in report.results)
    better = sum(result.beats_baseline for result in report.results)
    partial = [f"{x.name} {answered(x)}" for x in report.results if x.answered < x.records + x.left_out]
    more = ""
    if partial:
        listed = ", ".join(partial[:MAX_LISTED]) + (" and others" if len(partial) > MAX_LISTED else "")
        more = (
            f" Not all test records were answered, to save time: {listed}. eval.seconds=N allows more, and "
            "eval.records=N eval.answers=N eval.drawn=N set the numbers."
        )
    totals = (
        f"{significant} of {len(report.results)} tasks have a significant information gain (95 % interval above 0 "
        f"bits); {better} beat their baseline in both score and information. Evaluated in {duration(report.seconds)}: "
        f"{report.checkpoint}.{more}"
    )
    console.print(Text(totals, style="dim"))


def card(report: EvalReport, facts: RunFacts) -> str:
    """The model card: metadata for the Hugging Face Hub, size and training, scores, energy and limits."""
    energy = "The energy of its training is not known."
    if (account := facts.energy) is not None:
        energy = (
            f"{in_joules(account.tracker.joules)} ({account.joules_per_token:.3g} J per token; read by "
            f"{account.tracker.source}), {account.grams(account.tracker.joules):.3g} g CO2e with the electricity of "
            f"{account.grid.name} ({account.grid.grams_per_kwh:g} g/kWh, {account.grid.year}) and a PUE of "
            f"{account.pue:g}. The energy per token is {account.of_gpt3:.3%} of that of GPT-3's training. {GPT3_CAVEAT}"
        )
    rows = [
        f"| {_inline(result.name)} | {metric_title(result.metric)} | {score(result.metric, result.value)} "
        f"| {score(result.metric, result.baseline)} | {answered(result)} |"
        for result in report.results
    ]
    trained = f"Trained for {count(facts.steps)} steps on {count(facts.tokens)} tokens in {duration(facts.seconds)}."
    parts = [
        f"---\n{yaml.safe_dump(_metadata(report, facts), sort_keys=False, allow_unicode=True)}---",
        f"# {_inline(facts.name)}",
        f"A model of OpenM6{facts.preset and f', preset `{_inline(facts.preset)}`'}: {count(facts.total_parameters)} "
        f"parameters, {count(facts.active_parameters)} active per token. {trained if facts.steps else ''} "
        f"{facts.weights}".rstrip(),
        "`openm6.load` loads it in Python, from its folder or by the id of its repository on the Hub.",
        "## Scores",
        "Scores on test records." if rows else "It was not evaluated.",
        "\n".join(["| task | metric | score | baseline | records |", "|---|---|---|---|---|", *rows]) if rows else "",
        "## Energy",
        energy,
        "## Limits",
        "The model repeats what is in its training data, whether right or wrong, fair or unfair. Evaluate it on your "
        "own records (`openm6 evaluate RUN --data FILE`) before you rely on it.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(report: EvalReport, facts: RunFacts) -> dict[str, Any]:
    """What is known of a model in the form of the Hub: languages of its prompts, origins, emissions, scores."""
    found: dict[str, Any] = {"library_name": "openm6", "pipeline_tag": "any-to-any", "license": "unknown"}
    if (description := facts.description) is not None:
        known, tasks = all_tasks(description.tasks), {one.task for one in description.trained_tasks}
        found["pipeline_tag"] = "any-to-any" if tasks else "text-generation"
        found["language"] = sorted({code for name in tasks & known.keys() for code in known[name].prompts})
        paths = {one["path"] for one in description.sources.values() if one.get("kind") == "datasets"}
        found["datasets"] = sorted(path for path in paths if not Path(path).expanduser().exists())
        base = Path(description.base_model)  # a local path is absolute, one on the Hub is OWNER/NAME or a file in it
        found["base_model"] = "" if base.is_absolute() else "/".join(base.parts[:2])
    if (account := facts.energy) is not None:
        found["co2_eq_emissions"] = {
            "emissions": account.grams(account.tracker.joules),
            "source": f"metered by OpenM6 ({account.tracker.source}), {account.grid.grams_per_kwh:g} g CO2e per kWh",
            "geographical_location": account.grid.name,
        }
    results = [
        {
            "task": {"type": one.task.replace("_", "-"), "name": one.task},
            "dataset": {"type": one.source, "name": one.source, "split": "test"},
            "metrics": [
                {"type": metric, "name": metric_title(metric), "value": value}
                for metric, value in plain_data({one.metric: one.value, **one.metrics}).items()
                if value is not None
            ],
        }
        for one in report.results
    ]
    found["model-index"] = [{"name": facts.name, "results": results}] if results else []
    return {name: value for name, value in plain_data(found).items() if value}


def _inline(text: str) -> str:
    """Text as it may stand in a line or a cell of Markdown."""
    encodable = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate becomes a question mark
    return " ".join(encodable.replace("|", "/").replace("`", "'").split())
