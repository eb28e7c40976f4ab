"""Write docs/tasks.md from the list of tasks, or check that the page equals it.

python tools/tasks_page.py
python tools/tasks_page.py --check
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from openm6.core.files import replace_text
from openm6.evaluate.metrics import METRICS
from openm6.modalities.registry import MODALITIES
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Task

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tasks.md"
HEAD = ("task", "input", "output", "goal", "metrics", "baseline", "English prompt")
BASELINES = {
    "frequent_answer": "the commonest training answer in the language of the question",
    "position_frequencies": "how often each code occurs at its position in the training images or recordings",
    "column_median": "the median of the column in the training records",
    "chance": "the test records in random order",
    "last_value": "the last value repeated, or the last season repeated if that errs less on the test records",
}
OPENING = """\
# Tasks

A task names the fields of a record that are its inputs, the field that is its target, and prompts. Metrics and \
baseline follow from the target. The rows are sorted by the main input modality (the prompt shows all inputs), then by \
the output modality. `{name}` in a prompt stands for an input. Most tasks have several prompts, in English and in \
Chinese: training draws among them, evaluation uses the first. The first metric is compared with the baseline.

`openm6 tasks` prints the short form of this table. A recipe names a task together with a source; \
[your own data](own-data.md) shows how. This page is written by `python tools/tasks_page.py` from the list in \
`openm6/tasks/`, and a test keeps the two equal.
"""
INFORMATION = """\
*Information gain* comes with every task: log2 p(answer | inputs) − log2 p(answer | no inputs) in bits, averaged over \
test records. A tenth of the training examples of every task lose their inputs and keep their prompt, so one model \
predicts both; the frequencies of the training answers stand in for it if they predict the test answers better. The \
mean therefore stays below the entropy of the answers (`answer_entropy` in report.json, for closed sets of answers).

A gain is *significant* if its 95 % bootstrap interval lies above 0. A task *beats its baseline* only if its gain is \
significant and the interval of the difference to the baseline's score, over the same records, agrees. Forecast \
windows whose targets overlap are drawn together.
"""


def page(tasks: Iterable[Task]) -> str:
    """The whole page in Markdown."""
    order = list(MODALITIES)
    ordered = sorted(
        tasks, key=lambda task: (order.index(task.input_modality), order.index(task.output_modality))
    )
    parts = [
        OPENING,
        table(HEAD, [row(task) for task in ordered]),
        "## Metrics\n",
        INFORMATION,
        table(("metric", "meaning"), [(f"`{name}`", _note(name)) for name in _metrics(ordered)]),
        "## Baselines\n",
        table(("baseline", "answer"), [(f"`{name}`", BASELINES[name]) for name in _baselines(ordered)]),
    ]
    return "\n".join(parts)


def row(task: Task) -> tuple[str, ...]:
    """One task as the cells of a row."""
    metrics = ", ".join(f"`{name}`" for name in task.metrics)
    prompt = f"`{task.prompts['en'][0]}`"
    return (
        f"`{task.name}`",
        task.input_modality,
        task.output_modality,
        task.summary,
        metrics,
        f"`{task.baseline}`",
        prompt,
    )


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    cells = [list(head), *map(list, rows)]
    lines = ["| " + " | ".join(map(_escaped, line)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]) + "\n"


def _escaped(cell: str) -> str:
    """A cell that stays in its row: a bar or a line break would end it."""
    return cell.replace("|", "\\|").replace("\n", "\\n")


def _metrics(tasks: list[Task]) -> list[str]:
    return [name for name in METRICS if any(name in task.metrics for task in tasks)]


def _baselines(tasks: list[Task]) -> list[str]:
    return [name for name in BASELINES if any(name == task.baseline for task in tasks)]


def _note(metric: str) -> str:
    return f"{METRICS[metric].title}: {METRICS[metric].note}"


def main(words: list[str] | None = None) -> int:
    """Write the page, or with --check return 1 if it differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    wanted = page(TASKS.values())
    if not parser.parse_args(words).check:
        replace_text(PAGE, wanted)
        return 0
    same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted
    print("docs/tasks.md is up to date" if same else "docs/tasks.md differs: run python tools/tasks_page.py")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
