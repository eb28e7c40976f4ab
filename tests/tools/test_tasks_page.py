"""docs/tasks.md says what the list of tasks says."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import pytest

from openm6.evaluate.metrics import METRICS
from openm6.tasks.registry import TASKS
from tools import tasks_page
from tools.tasks_page import BASELINES, PAGE, main, page, table


def test_the_page_is_what_the_list_gives() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(TASKS.values())


def test_every_task_has_one_row_with_its_pair_and_prompt() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \|.*\| `([^`]+)` \|$", page(TASKS.values()), re.MULTILINE)
    assert sorted(rows) == sorted(
        (task.name, task.input_modality, task.output_modality, task.prompts["en"][0].replace("\n", "\\n"))
        for task in TASKS.values()
    )


def test_rows_are_sorted_by_pair_and_all_sixteen_pairs_are_there() -> None:
    rows = re.findall(r"^\| `\w+` \| (\w+) \| (\w+) \| ", page(TASKS.values()), re.MULTILINE)
    seen = list(dict.fromkeys(rows))
    assert len(seen) == len(set(rows)) == 16
    assert sum(1 for first, second in pairwise(rows) if first != second) == 15


def test_what_tasks_name_is_explained() -> None:
    text = page(TASKS.values())
    for task in TASKS.values():
        assert task.baseline in BASELINES
        assert set(task.metrics) <= set(METRICS)
        assert all(f"| `{name}` | " in text for name in (*task.metrics, task.baseline))


def test_a_bar_in_a_prompt_does_not_split_a_cell() -> None:
    assert table(("a", "b"), [("x|y", "z")]).splitlines()[-1] == r"| x\|y | z |"


def test_every_row_of_a_table_has_the_cells_of_its_head() -> None:
    found = re.findall(r"(?:^\|.*\n)+(?:.+\n)*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == 5
    for lines in map(str.splitlines, found):
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {lines[0].count("|")}


def test_a_line_break_in_a_prompt_does_not_end_a_row() -> None:
    assert table(("a", "b"), [("x\n", "z")]).splitlines()[-1] == r"| x\n | z |"


def test_check_tells_a_page_that_is_behind(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks_page, "PAGE", tmp_path / "tasks.md")
    assert main(["--check"]) == 1
    assert "run python tools/tasks_page.py" in capsys.readouterr().out
    assert main([]) == 0 and main(["--check"]) == 0
    renamed = [dataclasses.replace(task, summary="another") for task in TASKS.values()]
    (tmp_path / "tasks.md").write_text(page(renamed), encoding="utf-8")
    assert main(["--check"]) == 1
