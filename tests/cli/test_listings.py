"""Lists of what can be named."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from openm6.cli.listings import in_short
from openm6.cli.main import app
from openm6.models.presets import PRESETS
from openm6.serve.scenarios.scenario import read_library
from openm6.tasks.registry import TASKS

runner = CliRunner(env={"COLUMNS": "200"})


def test_presets_are_listed_with_their_sizes() -> None:
    shown = runner.invoke(app, ["presets"]).stdout
    assert all(name in shown for name in PRESETS)
    assert "1.003T" in shown


def test_a_narrow_terminal_cuts_no_name() -> None:
    """The names of recipes, in the last column, may go over several lines."""
    shown = runner.invoke(app, ["scenarios"], env={"COLUMNS": "40"}).stdout
    assert {line.split(" ", 2)[1] for line in shown.splitlines()} >= set(read_library().scenarios)
    assert "…" not in shown


def test_tasks_are_listed() -> None:
    shown = runner.invoke(app, ["tasks"]).stdout
    assert all(name in shown for name in TASKS)


@pytest.mark.parametrize(
    ("count", "words"),
    [(900, "900"), (4_726_912, "4.727M"), (10_150_000_000, "10.15B"), (1_003_000_000_000, "1.003T")],
)
def test_numbers_as_people_say_them(count: int, words: str) -> None:
    assert in_short(count) == words
