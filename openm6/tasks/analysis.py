"""Tasks that put numbers into words: a question about a row, a report, advice, the step that is out of line."""

from __future__ import annotations

from openm6.tasks.analysis_slots import RowAnswer, RowQuestion, SpikedSeries, SpikePlace, WholeRow
from openm6.tasks.slots import Text
from openm6.tasks.task import Task

ASK_NUMBERS = Task(
    name="ask_numbers",
    summary="answer a question about a row of numbers",
    given={"numbers": WholeRow(), "question": RowQuestion()},
    wanted=RowAnswer(),
    prompts={"en": ("{numbers} {question}",), "zh": ("{numbers} {question}",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="numbers",
    gives="text",
)
REPORT_NUMBERS = Task(
    name="report_numbers",
    summary="report in words what numbers say",
    given={"numbers": WholeRow()},
    wanted=Text("text", max_tokens=64),
    prompts={"en": ("{numbers} Report:",), "zh": ("{numbers} 报告：",)},
    metrics=("character_f1", "exact_match"),
    baseline="frequent_answer",
    reads="numbers",
    gives="text",
)
NAME_STATE = Task(
    name="name_state",
    summary="name the state that readings tell of",
    given={"numbers": WholeRow()},
    wanted=Text("label", max_tokens=16),
    prompts={"en": ("{numbers} Which state?",), "zh": ("{numbers} 什么状态？",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="numbers",
    gives="text",
)
ADVISE = Task(
    name="advise",
    summary="say what to do about a machine",
    given={"text": Text("text"), "numbers": WholeRow()},
    wanted=Text("advice", max_tokens=48),
    prompts={"en": ("{text} {numbers} What is to be done?",), "zh": ("{text} {numbers} 怎么处理？",)},
    metrics=("exact_match", "character_f1"),
    baseline="frequent_answer",
    reads="numbers",
    gives="text",
)
FIND_ANOMALY = Task(
    name="find_anomaly",
    summary="find the step of a series that is out of line",
    given={"series": SpikedSeries()},
    wanted=SpikePlace(),
    prompts={"en": ("{series} Anomaly?",), "zh": ("{series} 异常？",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="numbers",
    gives="text",
)

TASKS = (ASK_NUMBERS, REPORT_NUMBERS, NAME_STATE, ADVISE, FIND_ANOMALY)
