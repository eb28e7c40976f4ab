"""Tasks around one audio recording, and between audio and images or numbers."""

from __future__ import annotations

from openm6.tasks.builders import AUDIO_MATCH, NUMBER, UNMASKED_AUDIO
from openm6.tasks.slots import AUDIO, IMAGE, LABEL, NUMBERS, TEXT, Text
from openm6.tasks.task import Task

TASKS = (
    Task(
        name="transcribe",
        summary="write down what is said",
        inputs={"sound": AUDIO},
        target=Text("label", max_tokens=64),
        prompts={"en": ("{sound} What is said?", "{sound} Write it down."), "zh": ("{sound} 说的是什么？",)},
        metrics=("exact_match",),
    ),
    Task(
        name="name_sound",
        summary="say what made a sound",
        inputs={"sound": AUDIO},
        target=LABEL,
        prompts={"en": ("{sound} What made this sound?",), "zh": ("{sound} 这是什么声音？",)},
    ),
    Task(
        name="match_spoken",
        summary="say whether what is spoken fits a picture",
        inputs={"sound": AUDIO, "image": IMAGE},
        target=AUDIO_MATCH,
        prompts={"en": ("{image} {sound} Is it this?",), "zh": ("{image} {sound} 是这个吗？",)},
        needs_negatives=True,
    ),
    Task(
        name="speak",
        summary="say a text aloud",
        inputs={"text": Text("label")},
        target=AUDIO,
        prompts={"en": ("say {text}", "Say {text}."), "zh": ("说{text}", "请说{text}。")},
    ),
    Task(
        name="fill_sound",
        summary="fill in a gap in a sound",
        inputs={"sound": AUDIO},
        target=UNMASKED_AUDIO,
        prompts={"en": ("{sound} Fill in.",), "zh": ("{sound} 补全。",)},
        is_inpainting=True,
    ),
    Task(
        name="number_from_sound",
        summary="predict a number that an audio clip states",
        inputs={"sound": AUDIO},
        target=NUMBER,
        prompts={"en": ("{sound} What is the {column}?",), "zh": ("{sound} {column}是多少？",)},
    ),
    Task(
        name="say_numbers",
        summary="say aloud what numbers describe",
        inputs={"numbers": NUMBERS},
        target=AUDIO,
        prompts={"en": ("say {numbers}", "{numbers} Say it."), "zh": ("说{numbers}",)},
    ),
    Task(
        name="say_picture",
        summary="say aloud what a picture shows",
        inputs={"image": IMAGE},
        target=AUDIO,
        prompts={"en": ("{image} Say it.",), "zh": ("{image} 说出来。",)},
    ),
    Task(
        name="draw_sound",
        summary="draw what is said",
        inputs={"sound": AUDIO},
        target=IMAGE,
        prompts={"en": ("{sound} Draw it.",), "zh": ("{sound} 画出来。",)},
    ),
    Task(
        name="pair_sound",
        summary="embed an audio clip like the text that describes it",
        inputs={"text": TEXT},
        target=AUDIO,
        prompts={"en": ("{text}", "the sound of {text}"), "zh": ("{text}", "{text}的声音")},
        contrastive=True,
    ),
)
