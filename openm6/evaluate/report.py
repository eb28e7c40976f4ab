"""The report of a run: report.html, one file that needs nothing else, for people; report.json for programs."""

from __future__ import annotations

import math
from importlib.resources import files

from openm6.base.energy.units import in_joules
from openm6.base.files import replace_text
from openm6.base.plain_json import to_json
from openm6.base.run_folder import RunFolder
from openm6.evaluate.figures import METRIC_NOTES, count, duration, short_count, words
from openm6.evaluate.report_codecs import codecs
from openm6.evaluate.report_energy import energy
from openm6.evaluate.report_markup import Markup, quoted, raw_style, tag
from openm6.evaluate.report_pairs import pairs
from openm6.evaluate.report_samples import HEADINGS, samples_by_answer
from openm6.evaluate.report_training import training
from openm6.evaluate.results import Judgement, RunFacts, TaskResult

# Nothing is fetched and nothing runs, whatever a record holds; the escaping of text does not rest on this.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
SENSES = {"text": "text", "image": "pictures", "sound": "sound", "numbers": "numbers"}


def write_report(run: RunFolder, judgement: Judgement, facts: RunFacts) -> None:
    """Write report.html and report.json into the run's folder; each file is replaced whole or not at all.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    replace_text(run.path / "report.json", report_json(judgement, facts))
    replace_text(run.path / "report.html", report_html(run, judgement, facts))


def report_json(judgement: Judgement, facts: RunFacts) -> str:
    """Training and results as JSON: `seconds` of training, `params`, `tokens`, `steps`, `tasks`, `codecs`, `energy`."""
    content = {
        "seconds": facts.seconds,
        "params": {"total": facts.total_parameters, "active": facts.active_parameters},
        "tokens": facts.tokens,
        "steps": facts.steps,
        "tasks": {result.name: result.to_json() for result in judgement.results},
        "codecs": facts.codecs,
        "energy": facts.energy.to_json() if facts.energy is not None else None,
    }
    return to_json(content, indent=1) + "\n"


def report_html(run: RunFolder, judgement: Judgement, facts: RunFacts) -> str:
    """The whole page; training curves come from the run's metrics.jsonl."""
    results = judgement.results
    numbers = {result.name: number for number, result in enumerate(results)}
    body = tag(
        "main",
        _opening(judgement, facts),
        pairs(results, numbers),
        samples_by_answer(results, numbers),
        training(run, judgement, facts),
        energy(facts.energy),
        codecs(facts.codecs),
        _metrics(results),
        tag(
            "footer", "Written by OpenM6. The same figures for programs are in report.json, beside this file."
        ),
    )
    return (
        "<!doctype html>\n" + tag("html", _head(facts), tag("body", body), attributes={"lang": "en"}) + "\n"
    )


def _head(facts: RunFacts) -> Markup:
    css = files("openm6.evaluate").joinpath("report.css").read_text(encoding="utf-8")
    return tag(
        "head",
        tag("meta", attributes={"charset": "utf-8"}),
        tag("meta", attributes={"http-equiv": "Content-Security-Policy", "content": POLICY}),
        tag("meta", attributes={"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("meta", attributes={"name": "color-scheme", "content": "light dark"}),
        tag("title", f"{facts.name} · OpenM6 report"),
        raw_style(css),
    )


def _opening(judgement: Judgement, facts: RunFacts) -> Markup:
    tiles = {
        "parameters": short_count(facts.total_parameters),
        "active a token": short_count(facts.active_parameters),
        "tokens read": short_count(facts.tokens),
        "training": duration(facts.seconds),
        "tasks": str(len(judgement.results)),
        **({"energy": in_joules(facts.energy.ledger.joules)} if facts.energy is not None else {}),
    }
    return tag(
        "header.opening",
        tag("p.eyebrow", "OpenM6 · report of a run"),
        tag("h1", quoted(words(facts.name))),
        tag("p.summary", _trained(facts, judgement.results), " ", _found(judgement.results)),
        tag("dl.tiles", *[tag("div", tag("dd", value), tag("dt", name)) for name, value in tiles.items()]),
        _contents(judgement.results, facts),
    )


def _trained(facts: RunFacts, results: list[TaskResult]) -> str:
    taken, given = (
        _listed([word for kind, word in SENSES.items() if kind in kinds]) or "nothing that was evaluated"
        for kinds in ({result.reads for result in results}, {result.gives for result in results})
    )
    return (
        f"One transformer with sparse experts, of the size “{facts.preset}”: {count(facts.total_parameters)} "
        f"parameters, of which {count(facts.active_parameters)} work on any one token. In "
        f"{duration(facts.seconds)} and {count(facts.steps)} steps it read {count(facts.tokens)} tokens, "
        f"of tasks that take in {taken} and give out {given}."
    )


def _found(results: list[TaskResult]) -> str:
    if not results:
        return "No task was judged."
    compared = [result for result in results if math.isfinite(result.baseline)]
    better = sum(result.beats_baseline for result in compared)
    used = sum(result.uses_inputs for result in results)
    return (
        f"On test records it had never seen, its information gain is significant in {used} of {len(results)} tasks, "
        f"and it beats a plain baseline, in score and in information, in {better} of {len(compared)}."
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else ""


def _contents(results: list[TaskResult], facts: RunFacts) -> Markup:
    links = {"pairs": "Pairs"}
    shown = {result.gives for result in results if result.samples}
    links |= {f"gives-{kind}": title for kind, (title, _) in HEADINGS.items() if kind in shown}
    links |= {
        "training": "Training",
        **({"energy": "Energy"} if facts.energy is not None else {}),
        **({"codecs": "Codecs"} if facts.codecs else {}),
        "scores": "Reading the scores",
    }
    return tag("nav", *[tag("a", text, attributes={"href": f"#{place}"}) for place, text in links.items()])


def _metrics(results: list[TaskResult]) -> Markup:
    used = {name for result in results for name in (result.metric, *result.metrics)}
    rows = [
        tag("div", tag("dt", title), tag("dd", note))
        for name, (title, note) in METRIC_NOTES.items()
        if name in used
    ]
    records = tag(
        "p.lead",
        "Scores are means over test records; a baseline knows the habits of the training data, no more.",
    )
    head = tag("h2", "Reading the scores", attributes={"id": "scores"})
    return tag("section", head, records, tag("dl.glossary", *rows))
