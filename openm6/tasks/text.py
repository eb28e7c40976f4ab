"""Tasks from text to text: writing, continuation, denoising, translation, definitions, questions, verse."""

from __future__ import annotations

from openm6.tasks.builders import NUMBER, REST_OF_TEXT, SECOND_LINE, UNMASKED_TEXT
from openm6.tasks.slots import LABEL, QUESTION, TEXT, Body, Derived, Gloss, Text, Title
from openm6.tasks.task import Task

TASKS = {
    "keywords_to_text": Task(
        summary="Write a text from its keywords", inputs={"tags": Text("tags")}, target=TEXT,
        prompts={"en": ("Write about {tags}.", "Write: {tags}"), "zh": ("写：{tags}", "以{tags}为题写作。")},
        metrics=("char_bigram_f1",),
    ),
    "text_generation": Task(
        summary="Continue a text", inputs={"text": Derived("text")}, target=REST_OF_TEXT,
        prompts={"en": ("{text}",), "zh": ("{text}",)}, metrics=("char_bigram_f1",),
    ),
    "text_denoising": Task(
        summary="Restore the masked words of a text", inputs={"text": TEXT}, target=UNMASKED_TEXT,
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
        summary="Predict a number from a text", inputs={"text": TEXT}, target=NUMBER,
        prompts={"en": ("{text} What is its {column}?",), "zh": ("{text} {column}是多少？",)},
    ),
    "poem_generation": Task(
        summary="Write a poem from its title", inputs={"title": Title("text")}, target=Body("text", max_tokens=160),
        prompts={"en": ("A poem: {title}\n",), "zh": ("作诗：{title}\n",)}, metrics=("char_bigram_f1",),
    ),
    "couplet_completion": Task(
        summary="Write the second line of a couplet", inputs={"line": Derived("text")}, target=SECOND_LINE,
        prompts={"en": ("The line after: {line}\n",), "zh": ("对下联：{line}\n",)}, metrics=("char_bigram_f1",),
    ),
    "authorship_attribution": Task(
        summary="Name the author of a poem", inputs={"poem": Body("text")},
        target=Text("label", max_tokens=16, language="any"),
        prompts={"en": ("{poem} Who wrote it?",), "zh": ("{poem} 谁写的？",)},
    ),
}  # fmt: skip
