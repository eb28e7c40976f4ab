"""Tasks around one image: name, caption, question, match, draw, inpaint, tag, predict a number, embed."""

from __future__ import annotations

from openm6.tasks.builders import NUMBER, TEXT_MATCH, UNMASKED_IMAGE
from openm6.tasks.slots import IMAGE, LABEL, NUMBERS, QUESTION, TEXT, Text
from openm6.tasks.task import Task

TASKS = (
    Task(
        name="image_classification",
        summary="name the object in an image",
        inputs={"image": IMAGE},
        target=LABEL,
        prompts={
            "en": ("{image} What is this?", "{image} Name it."),
            "zh": ("{image} 这是什么？", "{image} 叫什么？"),
        },
    ),
    Task(
        name="image_captioning",
        summary="caption an image",
        inputs={"image": IMAGE},
        target=Text("text", max_tokens=64),
        prompts={
            "en": ("{image} Describe the picture.", "{image} Caption:"),
            "zh": ("{image} 描述这张图片。",),
        },
    ),
    Task(
        name="image_categorization",
        summary="name the category of an image",
        inputs={"image": IMAGE},
        target=LABEL,
        prompts={"en": ("{image} Category:",), "zh": ("{image} 类别：",)},
    ),
    Task(
        name="visual_question_answering",
        summary="answer a question about an image",
        inputs={"image": IMAGE, "question": QUESTION},
        target=Text("answer", max_tokens=16),
        prompts={"en": ("{image} {question}",), "zh": ("{image} {question}",)},
    ),
    Task(
        name="image_text_matching",
        summary="decide whether a text matches an image",
        inputs={"image": IMAGE, "text": TEXT},
        target=TEXT_MATCH,
        prompts={"en": ("{image} Is this {text}?",), "zh": ("{image} 这是{text}吗？",)},
        needs_negatives=True,
    ),
    Task(
        name="image_tagging",
        summary="list the keywords of an image",
        inputs={"image": IMAGE},
        target=Text("tags", max_tokens=48),
        prompts={"en": ("{image} Keywords:",), "zh": ("{image} 关键词：",)},
        metrics=("char_bigram_f1",),
    ),
    Task(
        name="text_to_image",
        summary="generate an image from a text",
        inputs={"text": TEXT},
        target=IMAGE,
        prompts={
            "en": ("draw {text}", "Draw {text}.", "A picture of {text}"),
            "zh": ("画{text}", "画一个{text}。"),
        },
    ),
    Task(
        name="image_inpainting",
        summary="generate the masked region of an image",
        inputs={"image": IMAGE},
        target=UNMASKED_IMAGE,
        prompts={"en": ("{image} Fill in.",), "zh": ("{image} 补全。",)},
        metrics=("bits_per_code", "masked_psnr"),
        is_inpainting=True,
    ),
    Task(
        name="image_regression",
        summary="predict a number from an image",
        inputs={"image": IMAGE},
        target=NUMBER,
        prompts={"en": ("{image} What is the {column}?",), "zh": ("{image} {column}是多少？",)},
    ),
    Task(
        name="tabular_to_image",
        summary="generate an image from a row of numbers",
        inputs={"numbers": NUMBERS},
        target=IMAGE,
        prompts={"en": ("draw {numbers}", "{numbers} Draw it."), "zh": ("画{numbers}",)},
    ),
    Task(
        name="image_text_retrieval",
        summary="align the embeddings of images and their texts",
        inputs={"text": TEXT},
        target=IMAGE,
        prompts={"en": ("{text}", "a picture of {text}"), "zh": ("{text}", "{text}的图片")},
        contrastive=True,
    ),
    Task(
        name="image_tag_retrieval",
        summary="align the embeddings of images and their keywords",
        inputs={"tags": Text("tags")},
        target=IMAGE,
        prompts={"en": ("{tags}",), "zh": ("{tags}",)},
        contrastive=True,
    ),
)
