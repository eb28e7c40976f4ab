"""Tasks around one audio recording, and between audio and images or numbers."""

from __future__ import annotations

from openm6.tasks.builders import AUDIO_MATCH, NUMBER, UNMASKED_AUDIO
from openm6.tasks.slots import AUDIO, IMAGE, LABEL, NUMBERS, TEXT, Text
from openm6.tasks.task import Task

TASKS = {
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
        target=AUDIO_MATCH,
        prompts={"en": ("{image} {audio} Is it this?",), "zh": ("{image} {audio} 是这个吗？",)}, needs_negatives=True,
    ),
    "text_to_speech": Task(
        summary="Generate speech from a text", inputs={"text": Text("label")}, target=AUDIO,
        prompts={"en": ("say {text}", "Say {text}."), "zh": ("说{text}", "请说{text}。")},
    ),
    "audio_inpainting": Task(
        summary="Generate the masked span of an audio clip", inputs={"audio": AUDIO}, target=UNMASKED_AUDIO,
        prompts={"en": ("{audio} Fill in.",), "zh": ("{audio} 补全。",)}, is_inpainting=True,
    ),
    "audio_regression": Task(
        summary="Predict a number from an audio clip", inputs={"audio": AUDIO}, target=NUMBER,
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
}  # fmt: skip
