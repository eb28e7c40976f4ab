"""Tasks over number columns and series: classify a row, predict a column, forecast."""

from __future__ import annotations

from openm6.tasks.slots import Columns, Future, OneColumn, Past, Text
from openm6.tasks.task import Task

CLASSIFY_NUMBERS = Task(
    name="classify_numbers",
    summary="name what a row of numbers describes",
    given={"numbers": Columns()},
    wanted=Text("label", max_tokens=16),
    prompts={"en": ("{numbers} What is this?", "{numbers} Which kind?"), "zh": ("{numbers} 这是什么？",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="numbers",
    gives="text",
)
PREDICT_NUMBER = Task(
    name="predict_number",
    summary="predict one column from the others",
    given={"numbers": Columns(at_least=2)},
    wanted=OneColumn(),
    prompts={"en": ("{numbers} What is its {column}?",), "zh": ("{numbers} {column}是多少？",)},
    metrics=("crps_share", "mae", "coverage_80"),
    baseline="column_median",
    reads="numbers",
    gives="numbers",
)
PREDICT_FROM_ALL = Task(
    name="predict_from_all",
    summary="predict one column from the text and the other columns",
    given={"text": Text("text"), "numbers": Columns(at_least=2)},
    wanted=OneColumn(),
    prompts={"en": ("{text} {numbers} What is its {column}?",), "zh": ("{text} {numbers} {column}是多少？",)},
    metrics=("crps_share", "mae", "coverage_80"),
    baseline="column_median",
    reads="numbers",
    gives="numbers",
)
FORECAST = Task(
    name="forecast",
    summary="forecast a series",
    given={"series": Past()},
    wanted=Future(),
    prompts={"en": ("{series} What comes next?",), "zh": ("{series} 接下来呢？",)},
    metrics=("crps_share", "mae", "coverage_80"),
    baseline="last_value",
    reads="numbers",
    gives="numbers",
)

TASKS = (CLASSIFY_NUMBERS, PREDICT_NUMBER, PREDICT_FROM_ALL, FORECAST)
