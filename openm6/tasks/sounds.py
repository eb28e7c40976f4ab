"""Tasks around one sound, and between sounds and pictures."""

from __future__ import annotations

from openm6.tasks.comparing_slots import Fits, MaybeSound, Shown
from openm6.tasks.slots import Columns, OneColumn, Picture, Sound, SoundWithGap, Text
from openm6.tasks.task import Task

TRANSCRIBE = Task(
    name="transcribe",
    summary="write down what is said",
    given={"sound": Sound()},
    wanted=Text("label", max_tokens=64),
    prompts={"en": ("{sound} What is said?", "{sound} Write it down."), "zh": ("{sound} 说的是什么？",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="sound",
    gives="text",
)
NAME_SOUND = Task(
    name="name_sound",
    summary="say what made a sound",
    given={"sound": Sound()},
    wanted=Text("label", max_tokens=16),
    prompts={"en": ("{sound} What made this sound?",), "zh": ("{sound} 这是什么声音？",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="sound",
    gives="text",
)
_MAYBE = MaybeSound()
MATCH_SPOKEN = Task(
    name="match_spoken",
    summary="say whether what is spoken fits a picture",
    given={"image": Picture(), "sound": Shown()},
    wanted=Fits(_MAYBE),
    compares=True,
    prompts={"en": ("{image} {sound} Is it this?",), "zh": ("{image} {sound} 是这个吗？",)},
    metrics=("exact_match",),
    baseline="frequent_answer",
    reads="sound",
    gives="text",
)
SPEAK = Task(
    name="speak",
    summary="say a text aloud",
    given={"text": Text("label")},
    wanted=Sound(),
    prompts={"en": ("say {text}", "Say {text}."), "zh": ("说{text}", "请说{text}。")},
    metrics=("code_bits", "recognised"),
    baseline="position_frequencies",
    reads="text",
    gives="sound",
)
FILL_SOUND = Task(
    name="fill_sound",
    summary="fill in a gap in a sound",
    given={"sound": SoundWithGap()},
    wanted=SoundWithGap(),
    prompts={"en": ("{sound} Fill in.",), "zh": ("{sound} 补全。",)},
    metrics=("code_bits",),
    baseline="position_frequencies",
    reads="sound",
    gives="sound",
)
NUMBER_FROM_SOUND = Task(
    name="number_from_sound",
    summary="predict a number that a sound tells",
    given={"sound": Sound()},
    wanted=OneColumn(),
    prompts={"en": ("{sound} What is the {column}?",), "zh": ("{sound} {column}是多少？",)},
    metrics=("crps_share", "mae", "coverage_80"),
    baseline="column_median",
    reads="sound",
    gives="numbers",
)
SAY_NUMBERS = Task(
    name="say_numbers",
    summary="say aloud what numbers describe",
    given={"numbers": Columns()},
    wanted=Sound(),
    prompts={"en": ("say {numbers}", "{numbers} Say it."), "zh": ("说{numbers}",)},
    metrics=("code_bits", "recognised"),
    baseline="position_frequencies",
    reads="numbers",
    gives="sound",
)
SAY_PICTURE = Task(
    name="say_picture",
    summary="say aloud what a picture shows",
    given={"image": Picture()},
    wanted=Sound(),
    prompts={"en": ("{image} Say it.",), "zh": ("{image} 说出来。",)},
    metrics=("code_bits", "recognised"),
    baseline="position_frequencies",
    reads="image",
    gives="sound",
)
DRAW_SOUND = Task(
    name="draw_sound",
    summary="draw what is said",
    given={"sound": Sound()},
    wanted=Picture(),
    prompts={"en": ("{sound} Draw it.",), "zh": ("{sound} 画出来。",)},
    metrics=("code_bits", "recognised"),
    baseline="position_frequencies",
    reads="sound",
    gives="image",
)

TASKS = (
    TRANSCRIBE,
    NAME_SOUND,
    MATCH_SPOKEN,
    SPEAK,
    FILL_SOUND,
    NUMBER_FROM_SOUND,
    SAY_NUMBERS,
    SAY_PICTURE,
    DRAW_SOUND,
)
