"""Tasks over number columns and series: classify, predict, forecast, question, report, find an anomaly."""

from __future__ import annotations

from openm6.tasks.builders import ANOMALY, COLUMN_ANSWER, FUTURE, NUMBER
from openm6.tasks.slots import LABEL, NUMBERS, TEXT, Derived, Numbers, Text
from openm6.tasks.task import Task

TASKS = (
    Task(
        name="tabular_classification",
        summary="name the class of a row of numbers",
        inputs={"numbers": NUMBERS},
        target=LABEL,
        prompts={"en": ("{numbers} What is this?", "{numbers} Which kind?"), "zh": ("{numbers} 这是什么？",)},
    ),
    Task(
        name="tabular_regression",
        summary="predict one column from the others",
        inputs={"numbers": Numbers(min_columns=2)},
        target=NUMBER,
        prompts={"en": ("{numbers} What is its {column}?",), "zh": ("{numbers} {column}是多少？",)},
    ),
    Task(
        name="text_tabular_regression",
        summary="predict one column from a text and the other columns",
        inputs={"text": TEXT, "numbers": Numbers(min_columns=2)},
        target=NUMBER,
        prompts={
            "en": ("{text} {numbers} What is its {column}?",),
            "zh": ("{text} {numbers} {column}是多少？",),
        },
    ),
    Task(
        name="time_series_forecasting",
        summary="forecast the next steps of a series",
        inputs={"series": Derived("numbers")},
        target=FUTURE,
        prompts={"en": ("{series} What comes next?",), "zh": ("{series} 接下来呢？",)},
        baseline="last_value",
    ),
    Task(
        name="table_question_answering",
        summary="answer a question about a row of numbers",
        inputs={"numbers": NUMBERS, "question": Derived("text")},
        target=COLUMN_ANSWER,
        prompts={"en": ("{numbers} {question}",), "zh": ("{numbers} {question}",)},
    ),
    Task(
        name="table_to_text",
        summary="describe a row of numbers in words",
        inputs={"numbers": NUMBERS},
        target=Text("text", max_tokens=64),
        prompts={"en": ("{numbers} Report:",), "zh": ("{numbers} 报告：",)},
    ),
    Task(
        name="state_classification",
        summary="name the state of a machine from its readings",
        inputs={"numbers": NUMBERS},
        target=LABEL,
        prompts={"en": ("{numbers} Which state?",), "zh": ("{numbers} 什么状态？",)},
    ),
    Task(
        name="maintenance_advice",
        summary="recommend maintenance from a report and readings",
        inputs={"text": TEXT, "numbers": NUMBERS},
        target=Text("advice", max_tokens=48),
        prompts={"en": ("{text} {numbers} What is to be done?",), "zh": ("{text} {numbers} 怎么处理？",)},
        metrics=("exact_match", "char_bigram_f1"),
    ),
    Task(
        name="anomaly_detection",
        summary="find the anomalous step of a series",
        inputs={"series": Derived("numbers")},
        target=ANOMALY,
        prompts={"en": ("{series} Anomaly?",), "zh": ("{series} 异常？",)},
    ),
)
