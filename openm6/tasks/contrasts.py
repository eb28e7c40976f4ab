"""Contrastive tasks: a text and the picture or sound that it tells of are to get like embeddings, others unlike."""

from __future__ import annotations

from openm6.tasks.slots import Caption, Picture, Sound
from openm6.tasks.task import Task

RECALLS = ("recall_at_1", "recall_at_5")

PAIR_PICTURE = Task(
    name="pair_picture",
    summary="embed a picture like the text that tells of it",
    given={"text": Caption("text")},
    wanted=Picture(),
    prompts={"en": ("{text}", "a picture of {text}"), "zh": ("{text}", "{text}的图片")},
    metrics=RECALLS,
    baseline="chance",
    reads="text",
    gives="image",
    contrasts=True,
)
PAIR_PICTURE_TAGS = Task(
    name="pair_picture_tags",
    summary="embed a picture like its keywords",
    given={"tags": Caption("tags")},
    wanted=Picture(),
    prompts={"en": ("{tags}",), "zh": ("{tags}",)},
    metrics=RECALLS,
    baseline="chance",
    reads="text",
    gives="image",
    contrasts=True,
)
PAIR_SOUND = Task(
    name="pair_sound",
    summary="embed a sound like the text that tells of it",
    given={"text": Caption("text")},
    wanted=Sound(),
    prompts={"en": ("{text}", "the sound of {text}"), "zh": ("{text}", "{text}的声音")},
    metrics=RECALLS,
    baseline="chance",
    reads="text",
    gives="sound",
    contrasts=True,
)

TASKS = (PAIR_PICTURE, PAIR_PICTURE_TAGS, PAIR_SOUND)
