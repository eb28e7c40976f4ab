"""Tasks around verse: a poem from its title, the second line of a couplet."""

from __future__ import annotations

from openm6.tasks.poem_slots import Author, Body, Heading, LowerLine, UpperLine
from openm6.tasks.task import Task

WRITE_POEM = Task(
    name="write_poem",
    summary="write a poem from its title",
    given={"title": Heading("text")},
    wanted=Body("text", max_tokens=160),
    prompts={"en": ("A poem: {title}\n",), "zh": ("作诗：{title}\n",)},
    metrics=("character_f1",),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)
COUPLET = Task(
    name="couplet",
    summary="answer the first line of a couplet with its second",
    given={"line": UpperLine("text")},
    wanted=LowerLine("text", max_tokens=32),
    prompts={"en": ("The line after: {line}\n",), "zh": ("对下联：{line}\n",)},
    metrics=("character_f1",),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)
NAME_POET = Task(
    name="name_poet",
    summary="say who wrote a poem",
    given={"poem": Body("text")},
    wanted=Author("label", max_tokens=16),
    prompts={"en": ("{poem} Who wrote it?",), "zh": ("{poem} 谁写的？",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="text",
    gives="text",
)

TASKS = (WRITE_POEM, COUPLET, NAME_POET)
