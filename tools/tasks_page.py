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
    "frequent_answer": "the most frequent training answer in the language of the prompt",
    "position_frequencies": "the frequency of each code at its position in the training images or recordings",
    "column_median": "the median of the column in the training records of the source",
    "chance": "the test records in random order",
    "last_value": "the last value repeated, or the last season repeated if its error on the test records is smaller",
}
OPENING = """\
# Tasks

A task names the inputs, the target and the prompts of an example. Inputs and target are fields of a \
[record](own-data.md#record-keys). Modalities, metrics and baseline follow from them.

- `openm6 tasks` prints a short form of the table below.
- A [recipe](own-data.md#recipe) combines tasks with sources, and can define [own tasks](own-data.md#own-tasks).
- `{name}` in a prompt stands for an input. Most tasks have several prompts, in English and in Chinese. Training \
selects one at random, evaluation uses the first.
- The first metric of a task is compared with the baseline.
- The [chat tasks](own-data.md#chats) have no prompt: the turns of a conversation are the input.
- Rows are sorted by input modality, then by output modality. The input modality is that of the first input that is \
not text, if there is one.

## List of tasks

"""
METRICS_OPENING = """\

## Metrics

A score is the mean of a metric over test records, with a 95 % bootstrap interval.

"""
BASELINES_OPENING = """\

## Baselines

A baseline is fitted to the training targets and uses no inputs of the test record, except for `last_value`, which \
uses the past of the series. If a model does not beat its baseline, its inputs do not help on this metric.

"""
INFORMATION = """\

## Information gain

The score of a baseline depends on the task. The information gain is the same quantity for every task and modality: \
the number of bits by which the inputs make the true answer more likely.

    information gain = log2 p(answer | inputs) − log2 p(answer | no inputs), averaged over test records

| information gain | meaning |
|---|---|
| 0 bits | the inputs do not change the prediction |
| 1 bit | the true answer is twice as likely with the inputs |
| 1.7 bits | the true answer is 3.2 times as likely, since 2^1.7 = 3.2 |
| 3.32 bits | the maximum for ten equally frequent answers, since log2 10 = 3.32 |
| below 0 | the model is overconfident: it would predict better without the inputs |

- **Without inputs.** A tenth of the training examples of every task but the contrastive ones lose their inputs and \
keep the prompt. So one model predicts both terms.
- **Upper bound.** The frequencies of the training answers replace the model without inputs if they predict the test \
answers better. The mean gain therefore cannot exceed the entropy of the answers by more than sampling error. \
`report.json` contains this entropy as `answer_entropy` for closed sets of answers.
- **Long answers.** The bits of all tokens of an answer are added. An image or a recording has many codes, so its \
gain can be large although each code becomes only a little more likely.
- **Inpainting.** Only the masked region is scored. Without inputs, the visible region is hidden too.

The definition is the pointwise V-information of Ethayarajh et al. ([2110.08420](https://arxiv.org/abs/2110.08420)).

## Significance

Test records are a sample, so each score has an interval. The intervals are 95 % bootstrap intervals: the records are \
resampled 2,000 times, and 95 % of the resampled means lie inside. Forecast windows that begin \
within one horizon are resampled together. Those at both sides of a border still share targets, so intervals of \
forecasts are somewhat too narrow.

| statement | condition |
|---|---|
| the information gain is *significant* | its interval lies above 0 |
| the model *beats its baseline* | the gain is significant, and the interval of the score difference to the baseline, \
over the same records, lies on the better side of 0 |

A gain that is not significant can mean that there is no effect, or that there are too few test records. \
`openm6 evaluate RUN eval.records=1000` uses more.
"""


def page(tasks: Iterable[Task]) -> str:
    """Return the whole page in Markdown."""
    order = list(MODALITIES)
    ordered = sorted(tasks, key=lambda task: (order.index(task.input_modality), order.index(task.output_modality)))
    parts = [
        OPENING,
        table(HEAD, [row(task) for task in ordered]),
        METRICS_OPENING,
        table(("metric", "name", "meaning", "better"), [metric_row(name) for name in _metrics(ordered)]),
        BASELINES_OPENING,
        table(("baseline", "prediction"), [(f"`{name}`", BASELINES[name]) for name in _baselines(ordered)]),
        INFORMATION,
    ]
    return "".join(parts)


def metric_row(name: str) -> tuple[str, ...]:
    """Return one metric as the cells of a row."""
    metric = METRICS[name]
    better = metric.better if metric.goal is None else f"{100 * metric.goal:g} %"
    return f"`{name}`", metric.title, metric.note, better


def row(task: Task) -> tuple[str, ...]:
    """Return one task as the cells of a row."""
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
    """Return a Markdown table."""
    cells = [list(head), *map(list, rows)]
    lines = ["| " + " | ".join(map(_escaped, line)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]) + "\n"


def _escaped(cell: str) -> str:
    """Return a cell without characters that would end it: bars and line breaks."""
    return cell.replace("|", "\\|").replace("\n", "\\n")


def _metrics(tasks: list[Task]) -> list[str]:
    return [name for name in METRICS if any(name in task.metrics for task in tasks)]


def _baselines(tasks: list[Task]) -> list[str]:
    return [name for name in BASELINES if any(name == task.baseline for task in tasks)]


def main(words: list[str] | None = None) -> int:
    """Write the page, or with --check return 1 if it differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    text = page(TASKS.values())
    if not parser.parse_args(words).check:
        replace_text(PAGE, text)
        return 0
    same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
    print("docs/tasks.md is up to date" if same else "docs/tasks.md differs: run python tools/tasks_page.py")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
