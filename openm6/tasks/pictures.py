"""Tasks around one picture: name, describe, classify, ask, match, draw, fill in, count and price it."""

from __future__ import annotations

from openm6.tasks.comparing_slots import Fits, MaybeText, Shown
from openm6.tasks.slots import Columns, OneColumn, Picture, PictureWithHole, Text
from openm6.tasks.task import Task

NAME_PICTURE = Task(
    name="name_picture",
    summary="say in a word what a picture shows",
    given={"image": Picture()},
    wanted=Text("label", max_tokens=16),
    prompts={
        "en": ("{image} What is this?", "{image} Name it."),
        "zh": ("{image} 这是什么？", "{image} 叫什么？"),
    },
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="image",
    gives="text",
)
DESCRIBE_PICTURE = Task(
    name="describe_picture",
    summary="caption a picture",
    given={"image": Picture()},
    wanted=Text("text", max_tokens=64),
    prompts={"en": ("{image} Describe the picture.", "{image} Caption:"), "zh": ("{image} 描述这张图片。",)},
    metrics=("character_f1", "exact_match"),
    baseline="frequent_answer",
    reads="image",
    gives="text",
)
CLASSIFY_PICTURE = Task(
    name="classify_picture",
    summary="name the category of a picture",
    given={"image": Picture()},
    wanted=Text("label", max_tokens=16),
    prompts={"en": ("{image} Category:",), "zh": ("{image} 类别：",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="image",
    gives="text",
)
ASK_PICTURE = Task(
    name="ask_picture",
    summary="answer a question about a picture",
    given={"image": Picture(), "question": Text("question")},
    wanted=Text("answer", max_tokens=16),
    prompts={"en": ("{image} {question}",), "zh": ("{image} {question}",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="image",
    gives="text",
)
_MAYBE = MaybeText("text")
MATCH_PICTURE = Task(
    name="match_picture",
    summary="say whether a text fits a picture",
    given={"image": Picture(), "text": Shown()},
    wanted=Fits(_MAYBE),
    compares=True,
    prompts={"en": ("{image} Is this {text}?",), "zh": ("{image} 这是{text}吗？",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="image",
    gives="text",
)
TAG_PICTURE = Task(
    name="tag_picture",
    summary="give the keywords of a picture",
    given={"image": Picture()},
    wanted=Text("tags", max_tokens=48),
    prompts={"en": ("{image} Keywords:",), "zh": ("{image} 关键词：",)},
    metrics=("character_f1",),
    baseline="frequent_answer",
    reads="image",
    gives="text",
)
DRAW = Task(
    name="draw",
    summary="draw what a text says",
    given={"text": Text("text")},
    wanted=Picture(),
    prompts={
        "en": ("draw {text}", "Draw {text}.", "A picture of {text}"),
        "zh": ("画{text}", "画一个{text}。"),
    },
    metrics=("code_bits", "recognised"),
    baseline="position_frequencies",
    reads="text",
    gives="image",
)
FILL_PICTURE = Task(
    name="fill_picture",
    summary="fill in a hole in a picture",
    given={"image": PictureWithHole()},
    wanted=PictureWithHole(),
    prompts={"en": ("{image} Fill in.",), "zh": ("{image} 补全。",)},
    metrics=("code_bits", "hole_psnr"),
    baseline="position_frequencies",
    reads="image",
    gives="image",
)
NUMBER_FROM_PICTURE = Task(
    name="number_from_picture",
    summary="predict a number of what a picture shows",
    given={"image": Picture()},
    wanted=OneColumn(),
    prompts={"en": ("{image} What is the {column}?",), "zh": ("{image} {column}是多少？",)},
    metrics=("crps_share", "mae", "coverage_80"),
    baseline="column_median",
    reads="image",
    gives="numbers",
)
DRAW_NUMBERS = Task(
    name="draw_numbers",
    summary="draw what numbers describe",
    given={"numbers": Columns()},
    wanted=Picture(),
    prompts={"en": ("draw {numbers}", "{numbers} Draw it."), "zh": ("画{numbers}",)},
    metrics=("code_bits", "recognised"),
    baseline="position_frequencies",
    reads="numbers",
    gives="image",
)

TASKS = (
    NAME_PICTURE,
    DESCRIBE_PICTURE,
    CLASSIFY_PICTURE,
    ASK_PICTURE,
    MATCH_PICTURE,
    TAG_PICTURE,
    DRAW,
    FILL_PICTURE,
    NUMBER_FROM_PICTURE,
    DRAW_NUMBERS,
)
