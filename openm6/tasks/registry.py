"""Tasks by name: the built-in ones, those of installed packages, and own ones of a recipe or a checkpoint.

A new built-in task is an entry of `BUILT_IN`; tasks of image editing and of chats are in files of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from openm6.core.config import build
from openm6.core.errors import ConfigError, nearest
from openm6.core.extensions import installed
from openm6.core.files import renamed
from openm6.tasks import chat, design, slots
from openm6.tasks.own import TaskConfig
from openm6.tasks.slots import AUDIO, IMAGE, LABEL, NUMBERS, QUESTION, TEXT, Body, Derived, Gloss, Numbers, Text, Title
from openm6.tasks.task import Task

ALL_INPUTS = {
    "image": IMAGE,
    "audio": AUDIO,
    "text": Derived("text"),
    "tags": Text("tags"),
    "numbers": Derived("numbers"),
    "categories": Derived("text"),
}
BUILT_IN = {
    # From text to text: writing, continuation, denoising, translation, definitions, questions, verse.
    "keywords_to_text": Task(
        summary="Write a text from its keywords", inputs={"tags": Text("tags")}, target=TEXT,
        prompts={"en": ("Write about {tags}.", "Write: {tags}"), "zh": ("写：{tags}", "以{tags}为题写作。")},
        metrics=("char_bigram_f1",),
    ),
    "text_generation": Task(
        summary="Continue a text", inputs={"text": Derived("text")}, target=slots.REST_OF_TEXT,
        prompts={"en": ("{text}",), "zh": ("{text}",)}, metrics=("char_bigram_f1",),
    ),
    "text_denoising": Task(
        summary="Restore the masked words of a text", inputs={"text": TEXT}, target=slots.UNMASKED_TEXT,
        prompts={"en": ("Restore: {text}",), "zh": ("还原：{text}",)}, metrics=("char_bigram_f1", "exact_match"),
    ),
    "translation": Task(
        summary="Translate a text between English and Chinese", inputs={"text": TEXT},
        target=Text("text", language="other"),
        prompts={"en": ("{text} In Chinese:",), "zh": ("{text} 用英语说：",)},
        metrics=("exact_match", "char_bigram_f1"),
    ),
    "word_translation": Task(
        summary="Translate a word between English and Chinese", inputs={"label": Text("label")},
        target=Text("label", language="other"),
        prompts={"en": ("{label} in Chinese:",), "zh": ("{label}用英语说：",)}, metrics=("exact_match",),
    ),
    "reverse_dictionary": Task(
        summary="Return the word for a definition", inputs={"text": Gloss("text")}, target=LABEL,
        prompts={"en": ("{text} In a word:",), "zh": ("{text} 一言以蔽之：",)},
        metrics=("exact_match", "char_bigram_f1"),
    ),
    "definition_generation": Task(
        summary="Define a word", inputs={"label": Text("label")}, target=Gloss("text"),
        prompts={"en": ("What is {label}?", "Define {label}."), "zh": ("什么是{label}？",)},
        metrics=("char_bigram_f1",),
    ),
    "question_answering": Task(
        summary="Answer a question about a text", inputs={"text": TEXT, "question": QUESTION},
        target=Text("answer", max_tokens=32),
        prompts={"en": ("{text} {question}",), "zh": ("{text}{question}",)}, metrics=("exact_match", "char_bigram_f1"),
    ),
    "text_classification": Task(
        summary="Name the category of a text", inputs={"text": TEXT}, target=LABEL,
        prompts={"en": ("{text} Category:",), "zh": ("{text} 类别：",)},
    ),
    "text_regression": Task(
        summary="Predict a number from a text", inputs={"text": TEXT}, target=slots.NUMBER,
        prompts={"en": ("{text} What is its {column}?",), "zh": ("{text} {column}是多少？",)},
    ),
    "poem_generation": Task(
        summary="Write a poem from its title", inputs={"title": Title("text")}, target=Body("text", max_tokens=160),
        prompts={"en": ("A poem: {title}\n",), "zh": ("作诗：{title}\n",)}, metrics=("char_bigram_f1",),
    ),
    "couplet_completion": Task(
        summary="Write the second line of a couplet", inputs={"line": Derived("text")}, target=slots.SECOND_LINE,
        prompts={"en": ("The line after: {line}\n",), "zh": ("对下联：{line}\n",)},
        metrics=("same_length", "char_bigram_f1"),
    ),
    "authorship_attribution": Task(
        summary="Name the author of a poem", inputs={"poem": Body("text")},
        target=Text("label", max_tokens=16, language="any"),
        prompts={"en": ("{poem} Who wrote it?",), "zh": ("{poem} 谁写的？",)},
    ),
    # Around one image: name, caption, question, match, draw, inpaint, tag, predict a number, embed.
    "image_classification": Task(
        summary="Name the object in an image", inputs={"image": IMAGE}, target=LABEL,
        prompts={"en": ("{image} What is this?", "{image} Name it."), "zh": ("{image} 这是什么？", "{image} 叫什么？")},
    ),
    "image_captioning": Task(
        summary="Caption an image", inputs={"image": IMAGE}, target=Text("text", max_tokens=64),
        prompts={"en": ("{image} Describe the picture.", "{image} Caption:"), "zh": ("{image} 描述这张图片。",)},
    ),
    "image_categorization": Task(
        summary="Name the category of an image", inputs={"image": IMAGE}, target=LABEL,
        prompts={"en": ("{image} Category:",), "zh": ("{image} 类别：",)},
    ),
    "visual_question_answering": Task(
        summary="Answer a question about an image", inputs={"image": IMAGE, "question": QUESTION},
        target=Text("answer", max_tokens=16),
        prompts={"en": ("{image} {question}",), "zh": ("{image} {question}",)},
    ),
    "image_text_matching": Task(
        summary="Decide whether a text matches an image", inputs={"image": IMAGE, "text": TEXT},
        target=slots.TEXT_MATCH,
        prompts={"en": ("{image} Is this {text}?",), "zh": ("{image} 这是{text}吗？",)}, needs_negatives=True,
    ),
    "image_tagging": Task(
        summary="List the keywords of an image", inputs={"image": IMAGE}, target=Text("tags", max_tokens=48),
        prompts={"en": ("{image} Keywords:",), "zh": ("{image} 关键词：",)}, metrics=("char_bigram_f1",),
    ),
    "text_to_image": Task(
        summary="Generate an image from a text", inputs={"text": TEXT}, target=IMAGE,
        prompts={"en": ("draw {text}", "Draw {text}.", "A picture of {text}"), "zh": ("画{text}", "画一个{text}。")},
    ),
    "image_inpainting": Task(
        summary="Generate the masked region of an image", inputs={"image": IMAGE}, target=slots.UNMASKED_IMAGE,
        prompts={"en": ("{image} Fill in.",), "zh": ("{image} 补全。",)}, metrics=("bits_per_code", "masked_psnr"),
        is_inpainting=True,
    ),
    "image_regression": Task(
        summary="Predict a number from an image", inputs={"image": IMAGE}, target=slots.NUMBER,
        prompts={"en": ("{image} What is the {column}?",), "zh": ("{image} {column}是多少？",)},
    ),
    "tabular_to_image": Task(
        summary="Generate an image from a row of numbers", inputs={"numbers": NUMBERS}, target=IMAGE,
        prompts={"en": ("draw {numbers}", "{numbers} Draw it."), "zh": ("画{numbers}",)},
    ),
    "image_text_retrieval": Task(
        summary="Align the embeddings of images and their texts", inputs={"text": TEXT}, target=IMAGE,
        prompts={"en": ("{text}", "a picture of {text}"), "zh": ("{text}", "{text}的图片")}, contrastive=True,
    ),
    "image_tag_retrieval": Task(
        summary="Align the embeddings of images and their keywords", inputs={"tags": Text("tags")}, target=IMAGE,
        prompts={"en": ("{tags}",), "zh": ("{tags}",)}, contrastive=True,
    ),
    **design.TASKS,
    # Around one audio recording, and between audio and images or numbers.
    "speech_recognition": Task(
        summary="Transcribe speech", inputs={"audio": AUDIO}, target=Text("label", max_tokens=64),
        prompts={"en": ("{audio} What is said?", "{audio} Write it down."), "zh": ("{audio} 说的是什么？",)},
        metrics=("exact_match",),
    ),
    "audio_classification": Task(
        summary="Name the source of an audio clip", inputs={"audio": AUDIO}, target=LABEL,
        prompts={"en": ("{audio} What made this sound?",), "zh": ("{audio} 这是什么声音？",)},
    ),
    "image_audio_matching": Task(
        summary="Decide whether a spoken word matches an image", inputs={"audio": AUDIO, "image": IMAGE},
        target=slots.AUDIO_MATCH,
        prompts={"en": ("{image} {audio} Is it this?",), "zh": ("{image} {audio} 是这个吗？",)}, needs_negatives=True,
    ),
    "text_to_speech": Task(
        summary="Generate speech from a text", inputs={"text": Text("label")}, target=AUDIO,
        prompts={"en": ("say {text}", "Say {text}."), "zh": ("说{text}", "请说{text}。")},
    ),
    "audio_inpainting": Task(
        summary="Generate the masked span of an audio clip", inputs={"audio": AUDIO}, target=slots.UNMASKED_AUDIO,
        prompts={"en": ("{audio} Fill in.",), "zh": ("{audio} 补全。",)}, is_inpainting=True,
    ),
    "audio_regression": Task(
        summary="Predict a number from an audio clip", inputs={"audio": AUDIO}, target=slots.NUMBER,
        prompts={"en": ("{audio} What is the {column}?",), "zh": ("{audio} {column}是多少？",)},
    ),
    "tabular_to_audio": Task(
        summary="Generate speech from a row of numbers", inputs={"numbers": NUMBERS}, target=AUDIO,
        prompts={"en": ("say {numbers}", "{numbers} Say it."), "zh": ("说{numbers}",)},
    ),
    "image_to_audio": Task(
        summary="Generate speech from an image", inputs={"image": IMAGE}, target=AUDIO,
        prompts={"en": ("{image} Say it.",), "zh": ("{image} 说出来。",)},
    ),
    "audio_to_image": Task(
        summary="Generate an image from speech", inputs={"audio": AUDIO}, target=IMAGE,
        prompts={"en": ("{audio} Draw it.",), "zh": ("{audio} 画出来。",)},
    ),
    "audio_text_retrieval": Task(
        summary="Align the embeddings of audio clips and their texts", inputs={"text": TEXT}, target=AUDIO,
        prompts={"en": ("{text}", "the sound of {text}"), "zh": ("{text}", "{text}的声音")}, contrastive=True,
    ),
    # Over number columns and series: classify, predict, forecast, question, report, find an anomaly.
    "tabular_classification": Task(
        summary="Name the class of a row of numbers", inputs={"numbers": NUMBERS}, target=LABEL,
        prompts={"en": ("{numbers} What is this?", "{numbers} Which kind?"), "zh": ("{numbers} 这是什么？",)},
    ),
    "tabular_regression": Task(
        summary="Predict one column from the others", inputs={"numbers": Numbers(min_columns=2)},
        target=slots.NUMBER,
        prompts={"en": ("{numbers} What is its {column}?",), "zh": ("{numbers} {column}是多少？",)},
    ),
    "text_tabular_regression": Task(
        summary="Predict one column from a text and the other columns",
        inputs={"text": TEXT, "numbers": Numbers(min_columns=2)}, target=slots.NUMBER,
        prompts={"en": ("{text} {numbers} What is its {column}?",), "zh": ("{text} {numbers} {column}是多少？",)},
    ),
    "record_classification": Task(
        summary="Predict a category from all else that a record holds", inputs=ALL_INPUTS, target=slots.ANY_CATEGORY,
        prompts={
            "en": ("{image} {audio} {text} {tags} {numbers} {categories} What is its {column}?",),
            "zh": ("{image} {audio} {text} {tags} {numbers} {categories} {column}是什么？",),
        },
        metrics=("exact_match",), optional=True,
    ),
    "record_regression": Task(
        summary="Predict a number from all else that a record holds", inputs=ALL_INPUTS, target=slots.ANY_NUMBER,
        prompts={
            "en": ("{image} {audio} {text} {tags} {numbers} {categories} What is its {column}?",),
            "zh": ("{image} {audio} {text} {tags} {numbers} {categories} {column}是多少？",),
        },
        optional=True,
    ),
    "time_series_forecasting": Task(
        summary="Forecast the next steps of a series", inputs={"series": Derived("numbers")}, target=slots.FUTURE,
        prompts={"en": ("{series} What comes next?",), "zh": ("{series} 接下来呢？",)}, baseline="last_value",
    ),
    "table_question_answering": Task(
        summary="Answer a question about a row of numbers", inputs={"numbers": NUMBERS, "question": Derived("text")},
        target=slots.COLUMN_ANSWER,
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
        summary="Find the anomalous step of a series", inputs={"series": Derived("numbers")}, target=slots.ANOMALY,
        prompts={"en": ("{series} Anomaly?",), "zh": ("{series} 异常？",)},
    ),
    # Of a shop. Besides image, title (`text`), keywords (`tags`), category (`label`) and numbers, they read what a
    # table keeps in `extra`: selling_points, script, attributes, review, sentiment, review_summary, query, history,
    # recommendation, buyer_question and buyer_answer.
    "product_title_generation": Task(
        summary="Write a product title from image and keywords", inputs={"image": IMAGE, "tags": Text("tags")},
        target=Text("text", max_tokens=48),
        prompts={"en": ("{image} {tags} Title:",), "zh": ("{image} {tags} 标题：",)},
    ),
    "selling_point_generation": Task(
        summary="Write the selling points of a product", inputs={"title": TEXT, "tags": Text("tags")},
        target=Text("selling_points", max_tokens=96),
        prompts={"en": ("{title} {tags} Selling points:",), "zh": ("{title} {tags} 卖点：",)},
    ),
    "script_generation": Task(
        summary="Write the script of a host for a live stream",
        inputs={"title": TEXT, "selling_points": Text("selling_points")}, target=Text("script", max_tokens=160),
        prompts={"en": ("{title} {selling_points} Live:",), "zh": ("{title} {selling_points} 直播：",)},
    ),
    "attribute_extraction": Task(
        summary="Extract the attributes of a product from image and title", inputs={"image": IMAGE, "title": TEXT},
        target=Text("attributes", max_tokens=48),
        prompts={"en": ("{image} {title} Attributes:",), "zh": ("{image} {title} 属性：",)},
    ),
    "product_classification": Task(
        summary="Name the category of a product from image and title", inputs={"image": IMAGE, "title": TEXT},
        target=LABEL,
        prompts={"en": ("{image} {title} Category:",), "zh": ("{image} {title} 类目：",)},
    ),
    "product_matching": Task(
        summary="Decide whether a title matches the image of a product", inputs={"image": IMAGE, "text": TEXT},
        target=slots.TEXT_MATCH,
        prompts={"en": ("{image} {text} The same product?",), "zh": ("{image} {text} 是同款吗？",)},
        needs_negatives=True,
    ),
    "sentiment_analysis": Task(
        summary="Classify a review as positive or negative", inputs={"review": Text("review")},
        target=Text("sentiment", max_tokens=8),
        prompts={"en": ("{review} Positive or negative?",), "zh": ("{review} 好评还是差评？",)},
    ),
    "review_summarization": Task(
        summary="Summarize reviews", inputs={"review": Text("review")}, target=Text("review_summary", max_tokens=48),
        prompts={"en": ("{review} In short:",), "zh": ("{review} 总结：",)},
    ),
    "product_search": Task(
        summary="Return the product for a query", inputs={"query": Text("query")}, target=Text("text", max_tokens=48),
        prompts={"en": ("search {query}:",), "zh": ("搜索{query}：",)},
    ),
    "product_recommendation": Task(
        summary="Recommend a product from past purchases, with a reason", inputs={"history": Text("history")},
        target=Text("recommendation", max_tokens=96),
        prompts={"en": ("Bought: {history} Next:",), "zh": ("买过：{history} 推荐：",)},
    ),
    "product_question_answering": Task(
        summary="Answer a buyer's question about a product",
        inputs={"title": TEXT, "attributes": Text("attributes"), "question": Text("buyer_question")},
        target=Text("buyer_answer", max_tokens=32),
        prompts={"en": ("{title} {attributes} {question}",), "zh": ("{title} {attributes} {question}",)},
    ),
    "price_prediction": Task(
        summary="Predict the price of a product from image and title", inputs={"image": IMAGE, "title": TEXT},
        target=slots.PRICE,
        prompts={"en": ("{image} {title} What is its {column}?",), "zh": ("{image} {title} {column}是多少？",)},
    ),
    "demand_forecasting": Task(
        summary="Forecast the sales of a product", inputs={"series": Derived("numbers")}, target=slots.FUTURE,
        prompts={"en": ("{series} Sales to come?",), "zh": ("{series} 未来销量？",)}, baseline="last_value",
    ),
    **chat.TASKS,
}  # fmt: skip
TASKS = {name: replace(task, name=name) for name, task in BUILT_IN.items()}
NONE: Mapping[str, Any] = MappingProxyType({})


@functools.cache
def _installed() -> Mapping[str, Task]:
    """The built-in tasks, and those of the entry points `openm6.tasks`, which cannot replace them."""
    found = {name: replace(task, name=name) for name, task in installed("openm6.tasks", Task).items()}
    return MappingProxyType({**found, **TASKS})


def all_tasks(own: Mapping[str, Any] = NONE) -> Mapping[str, Task]:
    """All tasks by name; `own`: those of a recipe or a checkpoint, as configs or plain values (ConfigError)."""
    if not own:
        return _installed()
    plain = {name: config for name, config in own.items() if not isinstance(config, TaskConfig)}
    built = {name: build(TaskConfig, values, f"task {name}") for name, values in plain.items()}
    return {**_installed(), **{name: config.task(name) for name, config in {**own, **built}.items()}}


def unknown_task(name: str, known: Mapping[str, Task] = NONE) -> str:
    """The sentence about a name that no task has: its new name, or the nearest of the known ones."""
    if new := renamed("task").get(name):
        return f"the task {name!r} was renamed to {new!r}"
    return f"no task is called {name!r}; {nearest(name, sorted(known or all_tasks()))}"


def task_named(name: str, known: Mapping[str, Task] = NONE) -> Task:
    """The task of this name among the known ones, by default all but own ones; ConfigError with the nearest if none."""
    known = known or all_tasks()
    if name not in known:
        raise ConfigError(unknown_task(name, known))
    return known[name]
