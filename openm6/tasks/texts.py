"""Tasks whose answer follows from text: write, go on, restore, translate, define, answer; and numbers from text."""

from __future__ import annotations

from openm6.tasks.slots import FirstPart, Gloss, OneColumn, OtherLanguage, Rest, Text, TextWithHoles
from openm6.tasks.task import Task

WRITE = Task(
    name="write",
    summary="write a text from its title or keywords",
    given={"tags": Text("tags")},
    wanted=Text("text"),
    prompts={"en": ("Write about {tags}.", "Write: {tags}"), "zh": ("写：{tags}", "以{tags}为题写作。")},
    metrics=("character_f1",),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)
CONTINUE = Task(
    name="continue",
    summary="go on with a text",
    given={"text": FirstPart("text")},
    wanted=Rest("text"),
    prompts={"en": ("{text}",), "zh": ("{text}",)},
    metrics=("character_f1",),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)
DENOISE = Task(
    name="denoise",
    summary="restore a text with a gap",
    given={"text": TextWithHoles("text")},
    wanted=Text("text"),
    prompts={"en": ("Restore: {text}",), "zh": ("还原：{text}",)},
    metrics=("character_f1", "exact_match"),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)
TRANSLATE = Task(
    name="translate",
    summary="say a text in the other language",
    given={"text": Text("text")},
    wanted=OtherLanguage("text"),
    prompts={"en": ("{text} In Chinese:",), "zh": ("{text} 用英语说：",)},
    metrics=("exact_match", "character_f1"),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)
TRANSLATE_LABEL = Task(
    name="translate_label",
    summary="say a word in the other language",
    given={"label": Text("label")},
    wanted=OtherLanguage("label"),
    prompts={"en": ("{label} in Chinese:",), "zh": ("{label}用英语说：",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)
DEFINE = Task(
    name="define",
    summary="find the word that a gloss defines",
    given={"text": Gloss("text")},
    wanted=Text("label", max_tokens=16),
    prompts={"en": ("{text} In a word:",), "zh": ("{text} 一言以蔽之：",)},
    metrics=("exact_match", "character_f1"),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)
EXPLAIN_WORD = Task(
    name="explain_word",
    summary="define a word",
    given={"label": Text("label")},
    wanted=Gloss("text", max_tokens=64),
    prompts={"en": ("What is {label}?", "Define {label}."), "zh": ("什么是{label}？",)},
    metrics=("character_f1",),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)
ANSWER = Task(
    name="answer",
    summary="answer a question about a text",
    given={"text": Text("text"), "question": Text("question")},
    wanted=Text("answer", max_tokens=32),
    prompts={"en": ("{text} {question}",), "zh": ("{text}{question}",)},
    metrics=("exact_match", "character_f1"),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)
CLASSIFY_TEXT = Task(
    name="classify_text",
    summary="name the category of a text",
    given={"text": Text("text")},
    wanted=Text("label", max_tokens=16),
    prompts={"en": ("{text} Category:",), "zh": ("{text} 类别：",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)
NUMBER_FROM_TEXT = Task(
    name="number_from_text",
    summary="predict a number of what a text describes",
    given={"text": Text("text")},
    wanted=OneColumn(),
    prompts={"en": ("{text} What is its {column}?",), "zh": ("{text} {column}是多少？",)},
    metrics=("crps_share", "mae", "coverage_80"),
    baseline="column_median",
    reads="text",
    gives="numbers",
)

TASKS = (
    WRITE,
    CONTINUE,
    DENOISE,
    TRANSLATE,
    TRANSLATE_LABEL,
    DEFINE,
    EXPLAIN_WORD,
    ANSWER,
    CLASSIFY_TEXT,
    NUMBER_FROM_TEXT,
)
