"""Results as a table in the terminal and as a line of the log."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from openm6.evaluate.report import print_table, result_line
from openm6.evaluate.results import EvalReport
from tests.evaluate import example_report as example


def printed(report: EvalReport, width: int = 150) -> str:
    stream = io.StringIO()
    print_table(report, Console(file=stream, width=width))
    return stream.getvalue()


def test_one_row_a_task_with_score_baseline_and_bits() -> None:
    report = dataclasses.replace(example.eval_report(), checkpoint="runs/x/step-9")
    text = printed(report)
    row = next(line for line in text.splitlines() if "image_classification/things" in line)
    assert row.split() == ["image_classification/things", "image", "→", "text", "exact", "match", "62.5", "%",
                           "25.0", "%", "+1.00", "+0.50", "…", "+1.50", "20", "of", "40"]  # fmt: skip
    table = text.partition("tasks have")[0]
    assert sum("/things" in line for line in table.splitlines()) == len(report.results)
    flat = " ".join(text.split())
    assert "6 of 8 tasks have a significant information gain" in flat and "runs/x/step-9" in flat
    assert "2 beat their baseline in both score and information" in flat
    assert "Not all test records were answered, to save time: image_classification/things 20 of 40, " in flat
    assert "and others. eval.seconds=N allows more" in flat


def test_a_line_of_the_log_says_how_sure_it_is() -> None:
    line = result_line(example.results()[0]).replace("\u00a0", " ")
    assert line == (
        "image_classification/things: exact match 62.5 % [50.0 %, 75.0 %], baseline 25.0 %; information +1.00 bits "
        "[+0.50, +1.50]; 20 of 40 records answered"
    )


def test_all_records_answered_needs_no_hint() -> None:
    task = dataclasses.replace(example.results()[0], answered=40)
    text = printed(EvalReport([task], 2.0, "x"))
    assert "eval.answers" not in text and " 40" in text


def test_records_that_were_not_evaluated_are_counted() -> None:
    task = dataclasses.replace(example.results()[0], records=60, answered=60, left_out=377)
    text = " ".join(printed(EvalReport([task], 2.0, "x"), width=80).split())
    assert "to save time: image_classification/things 60 of 437." in text and task.to_json()["n_left_out"] == 377


def test_square_brackets_in_names_are_no_markup() -> None:
    task = dataclasses.replace(example.results()[0], source="[red]shop[/red]", baseline=float("nan"))
    text = printed(EvalReport([task], 2.0, "x"))
    assert "image_classification/[red]shop[/red]" in text
    assert "–" in text


def test_a_narrow_terminal_cuts_no_name_and_no_number() -> None:
    task = dataclasses.replace(example.results()[0], task="image_regression", source="spoken_digits")
    text = printed(EvalReport([task], 2.0, "x"), width=80)
    first, second = next(two for two in zip(text.splitlines(), text.splitlines()[1:], strict=False) if "62.5" in two[0])
    assert first.split()[0] + second.split()[0] == "image_regression/spoken_digits"
    assert "25.0" in first and first.rstrip().endswith("+0.50 … +1.50")
