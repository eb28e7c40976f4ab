"""Tasks around one image: name, caption, question, match, draw, inpaint, tag, predict a number, embed."""

from __future__ import annotations

from openm6.tasks.builders import NUMBER, TEXT_MATCH, UNMASKED_IMAGE
from openm6.tasks.slots import IMAGE, LABEL, NUMBERS, QUESTION, TEXT, Text
from openm6.tasks.task import Task

TASKS = {
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
        summary="Decide whether a text matches an image", inputs={"image": IMAGE, "text": TEXT}, target=TEXT_MATCH,
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
        summary="Generate the masked region of an image", inputs={"image": IMAGE}, target=UNMASKED_IMAGE,
        prompts={"en": ("{image} Fill in.",), "zh": ("{image} 补全。",)}, metrics=("bits_per_code", "masked_psnr"),
        is_inpainting=True,
    ),
    "image_regression": Task(
        summary="Predict a number from an image", inputs={"image": IMAGE}, target=NUMBER,
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
}  # fmt: skip
