"""Tasks over number columns and series: classify, predict, forecast, question, report, find an anomaly."""

from __future__ import annotations

from openm6.tasks.builders import ANOMALY, ANY_CATEGORY, ANY_NUMBER, COLUMN_ANSWER, FUTURE, NUMBER
from openm6.tasks.slots import AUDIO, IMAGE, LABEL, NUMBERS, TEXT, Derived, Numbers, Text
from openm6.tasks.task import Task

ALL_INPUTS = {
    "image": IMAGE,
    "audio": AUDIO,
    "text": Derived("text"),
    "tags": Text("tags"),
    "numbers": Derived("numbers"),
    "categories": Derived("text"),
}
TASKS = {
    "tabular_classification": Task(
        summary="Name the class of a row of numbers", inputs={"numbers": NUMBERS}, target=LABEL,
        prompts={"en": ("{numbers} What is this?", "{numbers} Which kind?"), "zh": ("{numbers} 这是什么？",)},
    ),
    "tabular_regression": Task(
        summary="Predict one column from the others", inputs={"numbers": Numbers(min_columns=2)}, target=NUMBER,
        prompts={"en": ("{numbers} What is its {column}?",), "zh": ("{numbers} {column}是多少？",)},
    ),
    "text_tabular_regression": Task(
        summary="Predict one column from a text and the other columns",
        inputs={"text": TEXT, "numbers": Numbers(min_columns=2)}, target=NUMBER,
        prompts={"en": ("{text} {numbers} What is its {column}?",), "zh": ("{text} {numbers} {column}是多少？",)},
    ),
    "record_classification": Task(
        summary="Predict a category from all else that a record holds", inputs=ALL_INPUTS, target=ANY_CATEGORY,
        prompts={
            "en": ("{image} {audio} {text} {tags} {numbers} {categories} What is its {column}?",),
            "zh": ("{image} {audio} {text} {tags} {numbers} {categories} {column}是什么？",),
        },
        metrics=("exact_match",), optional=True,
    ),
    "record_regression": Task(
        summary="Predict a number from all else that a record holds", inputs=ALL_INPUTS, target=ANY_NUMBER,
        prompts={
            "en": ("{image} {audio} {text} {tags} {numbers} {categories} What is its {column}?",),
            "zh": ("{image} {audio} {text} {tags} {numbers} {categories} {column}是多少？",),
        },
        optional=True,
    ),
    "time_series_forecasting": Task(
        summary="Forecast the next steps of a series", inputs={"series": Derived("numbers")}, target=FUTURE,
        prompts={"en": ("{series} What comes next?",), "zh": ("{series} 接下来呢？",)}, baseline="last_value",
    ),
    "table_question_answering": Task(
        summary="Answer a question about a row of numbers", inputs={"numbers": NUMBERS, "question": Derived("text")},
        target=COLUMN_ANSWER,
        prompts={"en": ("{numbers} {question}",), "zh": ("{numbers} {question}",)},
    ),
    "table_to_text": Task(
        summary="Describe a row of numbers in words", inputs={"numbers": NUMBERS}, target=Text("text", max_tokens=64),
        prompts={"en": ("{numbers} Report:",), "zh": ("{numbers} 报告：",)},
    ),
    "state_classification": Task(
        summary="Name the state of a machine from its readings", inputs={"numbers": NUMBERS}, target=LABEL,
        prompts={"en": ("{numbers} Which state?",), "zh": ("{numbers} 什么状态？",)},
    ),
    "maintenance_advice": Task(
        summary="Recommend maintenance from a report and readings", inputs={"text": TEXT, "numbers": NUMBERS},
        target=Text("advice", max_tokens=48),
        prompts={"en": ("{text} {numbers} What is to be done?",), "zh": ("{text} {numbers} 怎么处理？",)},
        metrics=("exact_match", "char_bigram_f1"),
    ),
    "anomaly_detection": Task(
        summary="Find the anomalous step of a series", inputs={"series": Derived("numbers")}, target=ANOMALY,
        prompts={"en": ("{series} Anomaly?",), "zh": ("{series} 异常？",)},
    ),
}  # fmt: skip
